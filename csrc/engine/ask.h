/* The engine's words on the link: answers, questions and news, from two threads.
 *
 * vtpmd is asked only what the TPM and its custody do not say: whether a session makes something
 * else of a command of QEMU's. Who asks waits, and the link's own thread serves vtpmd meanwhile,
 * which may have the TPM do something before it answers.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "message.h"

struct asker;

/* Speak on a socket, which stays the caller's. Returns 0 or -ENOMEM. */
int asker_new(struct asker **asker, int fd);

/* NULL is none. */
void asker_free(struct asker *asker);

/* Say that the engine serves; only then is anything asked. Returns 0 or a negative errno. */
int asker_open(struct asker *asker);

/* vtpmd is gone: who waits for an answer, and who asks from now on, gets none. */
void asker_close(struct asker *asker);

/* Wait until asker_open(). Returns false if asker_close() came first. */
bool asker_wait(struct asker *asker);

/* Send a response. Returns 0 or a negative errno. */
int asker_send(struct asker *asker, const struct message *message);

/* Ask, and wait for the answer; one thread does, one question at a time. The caller ends `answer`,
 * which is MESSAGE_NONE at first. Returns 0, or -ENOTCONN without an answer. */
int asker_ask(struct asker *asker, const struct message *question, struct message *answer);

/* Return true while an answer to that is waited for. */
bool asker_is_asking(struct asker *asker, enum link_question number);

/* Take an answer, whose payload is the asker's then. Returns 0, or -EPROTO if that was not asked.
 */
int asker_answer(struct asker *asker, struct message *answer);

/* Say something that has no answer. The payload stays the caller's. */
void asker_tell(struct asker *asker, enum link_question number, uint32_t argument,
                const void *payload, uint32_t payload_bytes);
