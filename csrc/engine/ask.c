#include "ask.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "bytes.h"
#include "check.h"
#include "clock.h"

enum attachment {
    ALONE,
    EXPECTED,
    AWAY,
    ATTACHED,
    QUIET,
    CLOSED,
};

enum {
    QUESTIONS = LINK_ASK_RUNS - LINK_ASK_INIT + 1,
};

struct asker {
    pthread_mutex_t sending; /* a message is sent whole, and the socket not closed meanwhile */
    pthread_mutex_t lock;    /* over what follows */
    pthread_cond_t changed;
    enum attachment state;
    int fd;                         /* the link, also of a vtpmd that was silent, or -1 */
    bool is_serving;                /* a request of vtpmd's is carried out */
    bool is_deciding;               /* something is decided without vtpmd */
    int64_t heard_ms;               /* since when vtpmd is silent, while it is not served */
    const struct message *question; /* that an answer is waited for to, or NULL */
    struct message *answer;         /* where it goes */
    bool is_settled;                /* the last question was, without one */
    unsigned owed[QUESTIONS];       /* answers that nobody waits for any more */
};

int asker_new(struct asker **out)
{
    struct asker *asker = calloc(1, sizeof(*asker));

    if (!asker)
        return -ENOMEM;
    asker->state = EXPECTED;
    asker->fd = -1;
    check(pthread_mutex_init(&asker->sending, NULL) == 0);
    check(pthread_mutex_init(&asker->lock, NULL) == 0);
    clock_condition_init(&asker->changed);
    *out = asker;
    return 0;
}

void asker_free(struct asker *asker)
{
    if (!asker)
        return;
    close_descriptor(&asker->fd);
    pthread_cond_destroy(&asker->changed);
    pthread_mutex_destroy(&asker->lock);
    pthread_mutex_destroy(&asker->sending);
    free(asker);
}

/* The one writer of the state, with the lock. */
static void set_state(struct asker *asker, enum attachment state)
{
    if (asker->state != CLOSED)
        asker->state = state;
    pthread_cond_broadcast(&asker->changed);
}

static bool has_vtpmd(const struct asker *asker)
{
    return asker->state == ATTACHED || asker->state == QUIET;
}

/* With the lock: vtpmd is silent, or does not read. The link's thread sees the end of the
 * connection, and closes it.
 * sandbox: shutdown */
static void hang_up(struct asker *asker)
{
    if (!has_vtpmd(asker))
        return;
    shutdown(asker->fd, SHUT_RDWR);
    set_state(asker, AWAY);
}

/* sandbox: futex */
void asker_attach(struct asker *asker, int fd)
{
    pthread_mutex_lock(&asker->lock);
    /* Also who waited for the last one's answer has to have seen that none comes. */
    while ((asker->is_deciding || asker->question) && asker->state != CLOSED)
        pthread_cond_wait(&asker->changed, &asker->lock);
    check(asker->fd < 0); /* asker_detach() was called */
    asker->fd = fd;
    set_state(asker, ATTACHED);
    pthread_mutex_unlock(&asker->lock);
}

void asker_detach(struct asker *asker)
{
    pthread_mutex_lock(&asker->sending);
    pthread_mutex_lock(&asker->lock);
    hang_up(asker);
    asker->is_serving = false;
    memset(asker->owed, 0, sizeof(asker->owed));
    close_descriptor(&asker->fd);
    pthread_mutex_unlock(&asker->lock);
    pthread_mutex_unlock(&asker->sending);
}

void asker_be_asked(struct asker *asker, bool is_so)
{
    pthread_mutex_lock(&asker->lock);
    while (asker->is_deciding && asker->state != CLOSED)
        pthread_cond_wait(&asker->changed, &asker->lock);
    if (has_vtpmd(asker))
        set_state(asker, is_so ? ATTACHED : QUIET);
    pthread_mutex_unlock(&asker->lock);
}

void asker_be_alone(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    set_state(asker, ALONE);
    pthread_mutex_unlock(&asker->lock);
}

void asker_close(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    set_state(asker, CLOSED);
    pthread_mutex_unlock(&asker->lock);
}

bool asker_begin_request(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    asker->is_serving = has_vtpmd(asker);
    bool is_so = asker->is_serving;
    pthread_mutex_unlock(&asker->lock);
    return is_so;
}

/* Send a whole message to a vtpmd that is attached, also one that the engine tells of its end.
 * Returns 0 or a negative errno; then it is attached no more. */
static int send_whole(struct asker *asker, const struct message *message, int64_t deadline_ms)
{
    pthread_mutex_lock(&asker->sending);
    pthread_mutex_lock(&asker->lock);
    int fd = has_vtpmd(asker) || asker->state == CLOSED ? asker->fd : -1;
    pthread_mutex_unlock(&asker->lock);
    int r = fd < 0 ? -ENOTCONN : message_send(fd, message, deadline_ms);
    if (r < 0) {
        pthread_mutex_lock(&asker->lock);
        hang_up(asker);
        pthread_mutex_unlock(&asker->lock);
    }
    pthread_mutex_unlock(&asker->sending);
    return r;
}

int asker_end_request(struct asker *asker, const struct message *response)
{
    int r = send_whole(asker, response, clock_ms() + ASKER_SILENCE_MAX_MS);
    pthread_mutex_lock(&asker->lock);
    asker->is_serving = false;
    asker->heard_ms = clock_ms();
    pthread_cond_broadcast(&asker->changed);
    pthread_mutex_unlock(&asker->lock);
    return r;
}

/* With the lock: wait until the answer is there, or none will come. A vtpmd that is served is not
 * silent, however long that takes.
 * sandbox: futex */
static void wait_for_answer(struct asker *asker)
{
    while (asker->question && has_vtpmd(asker)) {
        int64_t deadline_ms = asker->heard_ms + ASKER_SILENCE_MAX_MS;
        if (asker->is_serving)
            pthread_cond_wait(&asker->changed, &asker->lock);
        else if (clock_ms() < deadline_ms)
            clock_wait_until(&asker->changed, &asker->lock, deadline_ms);
        else
            hang_up(asker);
    }
}

/* With the lock, and no request of a vtpmd under way. Returns what asker_ask() does where there is
 * no answer. */
static int decide(struct asker *asker)
{
    asker->is_deciding = asker->state != CLOSED;
    return asker->is_deciding ? ASKER_NOBODY : ASKER_CLOSED;
}

/* With the lock: QEMU may be here before the vtpmd that the engine was started with, which is not
 * waited for twice. */
static void wait_for_expected(struct asker *asker)
{
    int64_t deadline_ms = clock_ms() + ASKER_SILENCE_MAX_MS;

    while (asker->state == EXPECTED && clock_ms() < deadline_ms)
        clock_wait_until(&asker->changed, &asker->lock, deadline_ms);
    if (asker->state == EXPECTED)
        set_state(asker, AWAY);
}

static bool is_to_be_asked(const struct asker *asker, bool may_decide)
{
    return asker->state == ATTACHED || (asker->state == QUIET && !may_decide);
}

/* With the lock: wait for a request that is under way, of a vtpmd that is gone, or that may say by
 * it that it wants to be asked. Returns 0 if one is to be asked, else what asker_ask() does. */
static int begin_to_ask(struct asker *asker, bool may_decide)
{
    while (asker->is_serving && !is_to_be_asked(asker, may_decide))
        pthread_cond_wait(&asker->changed, &asker->lock);
    return is_to_be_asked(asker, may_decide) ? 0 : decide(asker);
}

/* With the lock: no answer has come. */
static int give_up(struct asker *asker)
{
    while (asker->is_serving)
        pthread_cond_wait(&asker->changed, &asker->lock);
    return decide(asker);
}

int asker_ask(struct asker *asker, const struct message *question, bool may_decide,
              struct message *answer)
{
    pthread_mutex_lock(&asker->lock);
    check(!asker->question);
    wait_for_expected(asker);
    int64_t now_ms = clock_ms();
    int r = begin_to_ask(asker, may_decide);
    if (r == 0) {
        asker->question = question;
        asker->answer = answer;
        asker->is_settled = false;
        asker->heard_ms = now_ms;
    }
    pthread_mutex_unlock(&asker->lock);
    if (r != 0)
        return r;
    send_whole(asker, question, now_ms + ASKER_SILENCE_MAX_MS); /* the answer may come at once */
    pthread_mutex_lock(&asker->lock);
    wait_for_answer(asker);
    if (asker->question)
        r = give_up(asker);
    else if (asker->is_settled)
        r = ASKER_SETTLED;
    asker->question = NULL;
    pthread_cond_broadcast(&asker->changed);
    pthread_mutex_unlock(&asker->lock);
    return r;
}

void asker_decided(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    asker->is_deciding = false;
    pthread_cond_broadcast(&asker->changed);
    pthread_mutex_unlock(&asker->lock);
}

bool asker_wait(struct asker *asker, int64_t deadline_ms)
{
    asker_decided(asker);
    pthread_mutex_lock(&asker->lock);
    while (!has_vtpmd(asker) && asker->state != CLOSED && clock_ms() < deadline_ms)
        clock_wait_until(&asker->changed, &asker->lock, deadline_ms);
    bool is_attached = has_vtpmd(asker);
    pthread_mutex_unlock(&asker->lock);
    return is_attached;
}

bool asker_is_alone(struct asker *asker)
{
    pthread_mutex_lock(&asker->lock);
    bool is_so = asker->state == ALONE;
    pthread_mutex_unlock(&asker->lock);
    return is_so;
}

/* With the lock. */
static bool is_asking(const struct asker *asker, uint32_t number)
{
    return asker->question && asker->question->header.operation == number;
}

bool asker_is_asking(struct asker *asker, enum link_question number)
{
    pthread_mutex_lock(&asker->lock);
    bool is_so = is_asking(asker, number);
    pthread_mutex_unlock(&asker->lock);
    return is_so;
}

/* With the lock: who has asked goes on. */
static void end_question(struct asker *asker)
{
    asker->question = NULL;
    pthread_cond_broadcast(&asker->changed);
}

void asker_settle(struct asker *asker, enum link_question number)
{
    pthread_mutex_lock(&asker->lock);
    if (is_asking(asker, number)) {
        asker->owed[number - LINK_ASK_INIT]++;
        asker->is_settled = true;
        end_question(asker);
    }
    pthread_mutex_unlock(&asker->lock);
}

/* With the lock: an answer has come that nobody waits for. */
static bool is_owed(struct asker *asker, uint32_t number)
{
    uint32_t place = number - LINK_ASK_INIT;

    if (place >= QUESTIONS || asker->owed[place] == 0)
        return false;
    asker->owed[place]--;
    return true;
}

int asker_answer(struct asker *asker, struct message *answer)
{
    int r = 0;

    pthread_mutex_lock(&asker->lock);
    if (!is_owed(asker, answer->header.operation)) {
        r = has_vtpmd(asker) && is_asking(asker, answer->header.operation) ? 0 : -EPROTO;
        if (r == 0) {
            *asker->answer = *answer;
            *answer = MESSAGE_NONE;
            end_question(asker);
        }
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

    send_whole(asker, &news, 0); /* who is gone needs no news */
}
