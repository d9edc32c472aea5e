#include "ask.h"

#include <errno.h>
#include <libtpms/tpm_library.h>
#include <pthread.h>
#include <stdlib.h>

#include "check.h"

enum link_state {
    NOT_YET,
    OPEN,
    CLOSED,
};

struct asker {
    int fd;
    pthread_mutex_t sending; /* a message is sent whole */
    pthread_mutex_t lock;    /* over what follows */
    pthread_cond_t changed;
    enum link_state state;
    uint32_t asked;         /* the operation that an answer is waited for of, or 0 */
    struct message *answer; /* where it goes */
};

int asker_new(struct asker **out, int fd)
{
    struct asker *asker = calloc(1, sizeof(*asker));

    if (!asker)
        return -ENOMEM;
    asker->fd = fd;
    check(pthread_mutex_init(&asker->sending, NULL) == 0);
    check(pthread_mutex_init(&asker->lock, NULL) == 0);
    check(pthread_cond_init(&asker->changed, NULL) == 0);
    *out = asker;
    return 0;
}

void asker_free(struct asker *asker)
{
    if (!asker)
        return;
    pthread_cond_destroy(&asker->changed);
    pthread_mutex_destroy(&asker->lock);
    pthread_mutex_destroy(&asker->sending);
    free(asker);
}

static void set_state(struct asker *asker, enum link_state state)
{
    pthread_mutex_lock(&asker->lock);
    asker->state = state;
    pthread_cond_broadcast(&asker->changed);
    pthread_mutex_unlock(&asker->lock);
}

int asker_send(struct asker *asker, const struct message *message)
{
    pthread_mutex_lock(&asker->sending);
    int r = message_send(asker->fd, message);
    pthread_mutex_unlock(&asker->sending);
    return r;
}

int asker_open(struct asker *asker)
{
    uint32_t version = TPMLIB_GetVersion();
    struct message ready = {
        .header = {LINK_READY, .payload_bytes = sizeof(version)},
        .payload = (uint8_t *)&version,
        .descriptor = -1,
    };

    int r = asker_send(asker, &ready);
    if (r == 0)
        set_state(asker, OPEN);
    return r;
}

void asker_close(struct asker *asker)
{
    set_state(asker, CLOSED);
}

/* sandbox: futex */
bool asker_wait(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    while (asker->state == NOT_YET)
        pthread_cond_wait(&asker->changed, &asker->lock);
    bool is_open = asker->state == OPEN;
    pthread_mutex_unlock(&asker->lock);
    return is_open;
}

int asker_ask(struct asker *asker, const struct message *question, struct message *answer)
{
    pthread_mutex_lock(&asker->lock);
    check(asker->asked == 0);
    asker->asked = question->header.operation;
    asker->answer = answer;
    pthread_mutex_unlock(&asker->lock);
    int r = asker_send(asker, question); /* the answer may come before the lock is held again */
    pthread_mutex_lock(&asker->lock);
    while (r == 0 && asker->asked != 0 && asker->state == OPEN)
        pthread_cond_wait(&asker->changed, &asker->lock);
    if (asker->asked != 0)
        r = -ENOTCONN;
    asker->asked = 0;
    pthread_mutex_unlock(&asker->lock);
    return r;
}

bool asker_is_asking(struct asker *asker, enum link_question number)
{
    pthread_mutex_lock(&asker->lock);
    bool is_so = asker->asked == number;
    pthread_mutex_unlock(&asker->lock);
    return is_so;
}

int asker_answer(struct asker *asker, struct message *answer)
{
    pthread_mutex_lock(&asker->lock);
    int r = asker->asked == answer->header.operation ? 0 : -EPROTO;
    if (r == 0) {
        *asker->answer = *answer;
        *answer = MESSAGE_NONE;
        asker->asked = 0;
        pthread_cond_broadcast(&asker->changed);
    }
    pthread_mutex_unlock(&asker->lock);
    return r;
}

void asker_tell(struct asker *asker, enum link_question number, uint32_t argument,
                const void *payload, uint32_t payload_bytes)
{
    struct message news = {
        .header = {number, .argument = argument, .payload_bytes = payload_bytes},
        .payload = (uint8_t *)payload,
        .descriptor = -1,
    };

    asker_send(asker, &news); /* who is gone needs no news */
}
