/* The engine's words on the link: answers, questions and news, from two threads.
 *
 * vtpmd is asked only what the TPM and its custody do not say: whether a session makes something
 * else of a command of QEMU's. Who asks waits, and the link's own thread serves vtpmd meanwhile,
 * which may have the TPM do something before it answers.
 *
 *     alone     no vtpmd has ever been attached, nor is one to be
 *     expected  the engine was started with one, which has yet to come
 *     away      none is attached now
 *     attached  one is
 *     quiet     one is, that has no session: what the engine may decide by itself, it does
 *     closed    none will be: the engine ends
 *
 *     alone, expected, away ──asker_attach()──► attached ──asker_detach(), or silence──► away
 *     expected ──asker_be_alone()──► alone
 *     expected ──a question has waited ASKER_SILENCE_MAX_MS for it──► away
 *     attached ◄──asker_be_asked()──► quiet, which goes as attached does
 *     any ──asker_close()──► closed
 *
 * vtpmd may die, hang or be stopped at any moment, and QEMU does not wait for it longer than
 * ASKER_SILENCE_MAX_MS: then it is attached no more, and nothing that it asks for is done. Without
 * one the caller decides (unasked.h), and none is attached before that is done: a vtpmd that comes
 * finds what was decided, and all of it.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "message.h"

enum {
    /* Longer than an INIT that waits for what has come to be taken up, and for the other host: 2 s
     * each. What the engine itself takes for vtpmd meanwhile does not count. */
    ASKER_SILENCE_MAX_MS = 5000,
};

struct asker;

/* A vtpmd is expected. Returns 0 or -ENOMEM. */
int asker_new(struct asker **asker);

/* No vtpmd is to come. */
void asker_be_alone(struct asker *asker);

/* NULL is none. */
void asker_free(struct asker *asker);

/* What the link's thread does. */

/* A vtpmd has connected, by a socket that does not block, which is the asker's then. Waits until
 * what is decided without one is done. */
void asker_attach(struct asker *asker, int fd);

/* It is gone, if one was there: who waits for an answer gets none. */
void asker_detach(struct asker *asker);

/* None will come: who waits for an answer, or for a vtpmd, and who asks from now on, gets none. */
void asker_close(struct asker *asker);

/* A request of vtpmd's is about to be carried out. Returns false if it must not: vtpmd is attached
 * no more. */
bool asker_begin_request(struct asker *asker);

/* It was: send the response. Returns 0 or a negative errno. */
int asker_end_request(struct asker *asker, const struct message *response);

/* It wants to be asked, or need not be. Once this returns, nothing that was decided without it is
 * under way where it wants to be asked. */
void asker_be_asked(struct asker *asker, bool is_so);

/* Take an answer, whose payload is the asker's then. Returns 0, or -EPROTO if that was not asked.
 */
int asker_answer(struct asker *asker, struct message *answer);

/* What was asked has come without an answer, if it was this: who waits goes on, and the answer,
 * once it comes, is dropped. */
void asker_settle(struct asker *asker, enum link_question number);

/* Return true while an answer to that is waited for. */
bool asker_is_asking(struct asker *asker, enum link_question number);

/* What the thread of the control channel does. */

enum {
    ASKER_NOBODY = 1,
    ASKER_CLOSED = 2,
    ASKER_SETTLED = 3,
};

/* Ask, and wait for the answer; one question at a time. The caller ends `answer`, which is
 * MESSAGE_NONE at first. Where `may_decide`, a vtpmd that need not be asked is not. Returns 0, or
 * ASKER_NOBODY: no vtpmd has answered, and none comes, nor says that it wants to be asked, until
 * asker_decided() or asker_wait(); ASKER_CLOSED; or ASKER_SETTLED. */
int asker_ask(struct asker *asker, const struct message *question, bool may_decide,
              struct message *answer);

/* What was decided without vtpmd, if anything was, is done. */
void asker_decided(struct asker *asker);

/* Nothing was decided: wait for a vtpmd to come by a deadline. Returns true if one is attached. */
bool asker_wait(struct asker *asker, int64_t deadline_ms);

/* Return true where there never was a vtpmd, nor is one to be. */
bool asker_is_alone(struct asker *asker);

/* Say something that has no answer; of any thread. Never waits: who does not read is attached no
 * more. The payload stays the caller's. */
void asker_tell(struct asker *asker, enum link_question number, uint32_t argument,
                const void *payload, uint32_t payload_bytes);
