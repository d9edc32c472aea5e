#include "blackout.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "ask.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "error.h"
#include "hold.h"
#include "incoming.h"
#include "lane.h"
#include "message.h"
#include "outgoing.h"
#include "recorder.h"
#include "tail.h"
#include "tpm.h"

enum {
    WAIT_MS = 10,
    REASON_STATE = 7, /* of a Refuse: docs/stream-format.md */
};

struct blackout {
    pthread_mutex_t lock; /* over what follows */
    struct tpm *tpm;
    struct asker *asker;
    _Atomic enum handover_state state;
    struct lane *lane; /* NULL: none, or it has ended */
    int lane_fd;
    struct tail_cipher *cipher; /* of the session that has the lane; it goes with that */
    bool is_source;
    struct outgoing outgoing;             /* the source's; it goes with the lane, too */
    struct recorder *recorder;            /* the source's */
    uint8_t recorded[LANE_SESSION_BYTES]; /* of which session it writes that it is offered */
    struct incoming incoming;             /* the destination's */
    uint8_t session[LANE_SESSION_BYTES];
    uint8_t frame[LANE_FRAME_BYTES]; /* what has come of the next one */
    size_t frame_bytes;
    uint8_t *tail; /* that QEMU gets */
    size_t tail_bytes;
    int64_t offered_ms;
    int64_t took_ns;             /* when QEMU brought it */
    struct link_digests digests; /* of what the tail ends at */
    struct link_handover told;   /* what vtpmd hears */
};

#define locked(blackout) hold_mutex(&(blackout)->lock)

static recorder_done recorded;

int blackout_new(struct blackout **out, struct tpm *tpm, struct asker *asker, struct io *io)
{
    struct blackout *blackout = calloc(1, sizeof(*blackout));

    if (!blackout)
        return -ENOMEM;
    int r = io ? recorder_new(&blackout->recorder, io, recorded, blackout) : 0;
    if (r < 0) {
        free(blackout);
        return r;
    }
    blackout->tpm = tpm;
    blackout->asker = asker;
    blackout->lane_fd = BLACKOUT_NO_LANE;
    check(pthread_mutex_init(&blackout->lock, NULL) == 0);
    *out = blackout;
    return 0;
}

static void end_lane(struct blackout *blackout)
{
    lane_free(blackout->lane);
    blackout->lane = NULL;
    tail_cipher_free(blackout->cipher);
    blackout->cipher = NULL;
    outgoing_deinit(&blackout->outgoing);
    close_descriptor(&blackout->lane_fd);
    blackout->frame_bytes = 0;
}

static void forget_tail(struct blackout *blackout)
{
    free(blackout->tail);
    blackout->tail = NULL;
    blackout->tail_bytes = 0;
}

void blackout_free(struct blackout *blackout)
{
    if (!blackout)
        return;
    recorder_free(blackout->recorder);
    end_lane(blackout);
    forget_tail(blackout);
    incoming_deinit(&blackout->incoming);
    pthread_mutex_destroy(&blackout->lock);
    free(blackout);
}

static void take(struct blackout *blackout, enum handover_event event);

static bool may(const struct blackout *blackout, enum handover_event event)
{
    return handover_step(blackout->state, event).is_possible;
}

/* sandbox: sendmsg */
static bool send_bytes(int fd, uint8_t *bytes, size_t n_bytes)
{
    struct iovec vector = {bytes, n_bytes};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};

    return sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)n_bytes;
}

/* A socket that does not take a frame at once has a link behind it that is of no use. */
static void send_frame(struct blackout *blackout, const struct lane_frame *frame)
{
    uint8_t bytes[LANE_FRAME_BYTES];

    if (blackout->lane && (lane_seal(blackout->lane, frame, bytes) != 0 ||
                           !send_bytes(blackout->lane_fd, bytes, sizeof(bytes))))
        end_lane(blackout); /* the other side finds out; who waits here has a time limit */
}

static void send_take(struct blackout *blackout)
{
    struct lane_frame frame = {
        .kind = LANE_TAKE,
        .apply_us = blackout->told.apply_us,
        .start_us = blackout->told.start_us,
    };

    memcpy(frame.permanent_digest, blackout->digests.permanent_digest, LANE_DIGEST_BYTES);
    memcpy(frame.volatile_digest, blackout->digests.volatile_digest, LANE_DIGEST_BYTES);
    send_frame(blackout, &frame);
}

static void send_end(struct blackout *blackout)
{
    struct lane_frame frame = {
        .kind = blackout->is_source ? LANE_GO_ON : LANE_REFUSE,
        .reason = blackout->is_source ? 0 : REASON_STATE,
    };

    send_frame(blackout, &frame);
}

static uint32_t us_since(int64_t began_ns)
{
    return (uint32_t)((clock_ns() - began_ns) / NS_PER_US);
}

static void retire(struct blackout *blackout)
{
    int64_t began_ns = clock_ns();
    bool is_retired = tpm_retire(blackout->tpm, false) == TPM_SUCCESS;

    blackout->told.retire_us = us_since(began_ns);
    take(blackout, is_retired ? HANDOVER_RETIRED : HANDOVER_NOT_RETIRED);
}

static void expect(struct blackout *blackout)
{
    check(tpm_expect(blackout->tpm) == TPM_SUCCESS); /* it is on standby, and no one else's */
}

static void tell(struct blackout *blackout, enum handover_event event)
{
    blackout->told.event = event;
    blackout->told.is_source = blackout->is_source;
    memcpy(blackout->told.session, blackout->session, sizeof(blackout->told.session));
    if (blackout->asker)
        asker_tell(blackout->asker, LINK_TELL_HANDOVER, blackout->state, &blackout->told,
                   sizeof(blackout->told));
}

/* Take an event that is possible, and carry out what follows. */
static void take(struct blackout *blackout, enum handover_event event)
{
    struct handover_step step = handover_step(blackout->state, event);

    check(step.is_possible);
    blackout->state = step.state;
    if (step.actions & HANDOVER_DO_EXPECT)
        expect(blackout);
    if (step.actions & HANDOVER_DO_SEND_TAKE)
        send_take(blackout);
    if (step.actions & HANDOVER_DO_SEND_GRANT)
        send_frame(blackout, &(struct lane_frame){.kind = LANE_GRANT});
    if (step.actions & HANDOVER_DO_SEND_END)
        send_end(blackout);
    if (step.actions & HANDOVER_DO_CLOSE)
        end_lane(blackout);
    if (step.actions & HANDOVER_DO_TELL)
        tell(blackout, event);
    if (step.actions & HANDOVER_DO_RETIRE)
        retire(blackout);
}

static int use_keying(struct blackout *blackout, const struct lane_keying *keying, bool is_source)
{
    struct lane *lane = NULL;
    struct tail_cipher *cipher = NULL;

    int r = lane_new(&lane, keying, is_source);
    if (r == 0)
        r = tail_cipher_new(&cipher, keying);
    if (r < 0) {
        lane_free(lane);
        return r;
    }
    end_lane(blackout);
    blackout->lane = lane;
    blackout->cipher = cipher;
    return 0;
}

/* End the session that has the lane. Returns false if that was granted. */
static bool withdraw(struct blackout *blackout)
{
    if (may(blackout, HANDOVER_WITHDRAW))
        take(blackout, HANDOVER_WITHDRAW);
    else if (blackout->state == HANDOVER_GRANTED && !blackout->is_source)
        end_lane(blackout); /* what was granted was another session's, and stays so */
    else
        return false;
    return true;
}

/* What a session before has left is not the next one's. Returns false if it was granted to this
 * host. */
static bool end_session(struct blackout *blackout)
{
    if (!withdraw(blackout) && blackout->state != HANDOVER_GRANTED)
        return false;
    incoming_deinit(&blackout->incoming);
    return true;
}

TPM_RESULT blackout_set_lane(struct blackout *blackout, int fd, const struct lane_keying *keying,
                             bool is_source)
{
    locked(blackout);
    /* A key serves for one lane: its frames' numbers begin anew. */
    if (memcmp(blackout->session, keying->session, sizeof(blackout->session)) == 0)
        return TPM_BAD_ORDINAL;
    if (!end_session(blackout))
        return TPM_BAD_ORDINAL;
    if (use_keying(blackout, keying, is_source) < 0)
        return TPM_SIZE;
    blackout->lane_fd = fd;
    blackout->is_source = is_source;
    memcpy(blackout->session, keying->session, sizeof(blackout->session));
    return TPM_SUCCESS;
}

TPM_RESULT blackout_keep_base(struct blackout *blackout, struct store *store, uint64_t permanent,
                              uint64_t following)
{
    locked(blackout);
    if (!blackout->lane || !blackout->is_source)
        return TPM_BAD_ORDINAL;
    int r = outgoing_keep_base(&blackout->outgoing, store, permanent, following);
    if (r == -ESTALE)
        return TPM_BAD_ORDINAL;
    return r < 0 ? TPM_SIZE : TPM_SUCCESS;
}

/* Returns false where vtpmd has to see to it. */
static bool offer_captured(struct blackout *blackout, struct store *store,
                           struct blackout_captured *captured)
{
    struct outgoing_tail tail;

    if (!blackout->lane || !outgoing_has_base(&blackout->outgoing) ||
        !may(blackout, HANDOVER_OFFER) || tpm_has_worked(blackout->tpm))
        return false;
    if (outgoing_make_tail(&blackout->outgoing, store, blackout->cipher, captured->said, &tail) < 0)
        return false;
    forget_tail(blackout);
    blackout->tail = tail.bytes;
    blackout->tail_bytes = tail.n_bytes;
    blackout->digests = captured->digests = tail.digests;
    blackout->offered_ms = clock_ms();
    take(blackout, HANDOVER_OFFER);
    return true;
}

TPM_RESULT blackout_record(struct blackout *blackout, int fd,
                           const uint8_t sector[LINK_SECTOR_BYTES])
{
    locked(blackout);
    if (!blackout->recorder || recorder_begin(blackout->recorder, fd, sector) < 0)
        return TPM_BAD_ORDINAL;
    memcpy(blackout->recorded, blackout->session, sizeof(blackout->recorded));
    return TPM_SUCCESS;
}

/* Of the session that has the lane now: what another one had recorded says nothing of that. */
static void take_recorded(struct blackout *blackout)
{
    locked(blackout);
    bool is_its = memcmp(blackout->recorded, blackout->session, sizeof(blackout->recorded)) == 0;

    if (is_its && may(blackout, HANDOVER_RECORDED))
        take(blackout, HANDOVER_RECORDED);
}

static void recorded(void *argument, int r, uint32_t took_us)
{
    struct blackout *blackout = argument;
    struct link_recorded says = {.error = (uint32_t)-r, .took_us = took_us};

    if (r == 0)
        take_recorded(blackout);
    if (blackout->asker)
        asker_tell(blackout->asker, LINK_TELL_RECORDED, 0, &says, sizeof(says));
}

void blackout_wait_for_record(struct blackout *blackout)
{
    if (blackout->recorder)
        recorder_wait(blackout->recorder);
}

TPM_RESULT blackout_capture(struct blackout *blackout, struct store *store, bool offers,
                            struct blackout_captured *captured)
{
    *captured = (struct blackout_captured){0};
    locked(blackout);
    TPM_RESULT result = tpm_capture(blackout->tpm, store, &captured->worked, &captured->said);
    if (captured->worked && handover_has_tail(blackout->state))
        take(blackout, HANDOVER_LET_GO); /* who captures, knows */
    if (captured->worked && handover_has_given(blackout->state))
        take(blackout, HANDOVER_RUNS);
    if (result == TPM_SUCCESS && offers)
        captured->is_offered = offer_captured(blackout, store, captured);
    return result;
}

TPM_RESULT blackout_stage(struct blackout *blackout, const struct staged_records *records,
                          const enum link_shutdown *said)
{
    locked(blackout);
    /* What a tail was taken for changes no more. */
    if (handover_has_taken(blackout->state))
        return TPM_BAD_ORDINAL;
    return incoming_stage(&blackout->incoming, blackout->tpm, records, said);
}

TPM_RESULT blackout_get_staged(struct blackout *blackout, struct message *answer)
{
    const struct image *image = &blackout->incoming.staged.permanent;
    uint64_t generation;

    locked(blackout);
    if (!image->exists || !image->is_numbered)
        return TPM_BAD_ORDINAL;
    generation = image->generation;
    answer->payload = malloc(sizeof(generation) + image->n_bytes);
    if (!answer->payload)
        return TPM_SIZE;
    memcpy(answer->payload, &generation, sizeof(generation));
    memcpy(answer->payload + sizeof(generation), image->bytes, image->n_bytes);
    answer->header.payload_bytes = (uint32_t)(sizeof(generation) + image->n_bytes);
    return TPM_SUCCESS;
}

TPM_RESULT blackout_forget(struct blackout *blackout, bool goes_on, bool has_given)
{
    locked(blackout);
    if (handover_has_taken(blackout->state))
        return TPM_BAD_ORDINAL;
    if (!goes_on) {
        incoming_deinit(&blackout->incoming);
        if (!blackout->is_source)
            end_lane(blackout);
    }
    return has_given ? TPM_SUCCESS : tpm_forget_state(blackout->tpm);
}

void blackout_unstage(struct blackout *blackout)
{
    locked(blackout);
    incoming_deinit(&blackout->incoming);
}

TPM_RESULT blackout_say(struct blackout *blackout, enum handover_event event)
{
    locked(blackout);
    if (!may(blackout, event))
        return TPM_BAD_ORDINAL;
    take(blackout, event);
    return TPM_SUCCESS;
}

TPM_RESULT blackout_withdraw(struct blackout *blackout, enum handover_state *before)
{
    locked(blackout);
    *before = blackout->state;
    return withdraw(blackout) ? TPM_SUCCESS : TPM_BAD_ORDINAL;
}

/* While INIT waits, the lane is that thread's: of two that wait for a frame the one that does not
 * need it may be first, and would not wake the other. */
static bool is_lane_in_use(const struct blackout *blackout)
{
    return blackout->state == HANDOVER_WAITING;
}

int blackout_lane_fd(struct blackout *blackout)
{
    locked(blackout);
    return is_lane_in_use(blackout) ? BLACKOUT_NO_LANE : blackout->lane_fd;
}

enum handover_state blackout_state(struct blackout *blackout)
{
    locked(blackout);
    return blackout->state;
}

static bool are_digests(const struct blackout *blackout, const struct lane_frame *frame)
{
    return memcmp(frame->permanent_digest, blackout->digests.permanent_digest, LANE_DIGEST_BYTES) ==
               0 &&
           memcmp(frame->volatile_digest, blackout->digests.volatile_digest, LANE_DIGEST_BYTES) ==
               0;
}

static enum handover_event event_of(struct blackout *blackout, const struct lane_frame *frame)
{
    switch (frame->kind) {
    case LANE_TAKE:
        blackout->told.apply_us = frame->apply_us;
        blackout->told.start_us = frame->start_us;
        return are_digests(blackout, frame) ? HANDOVER_TAKE : HANDOVER_TAKE_OTHER;
    case LANE_GRANT:
        blackout->told.wait_us = us_since(blackout->took_ns);
        return HANDOVER_GRANT;
    case LANE_REFUSE:
    case LANE_GO_ON:
        return HANDOVER_END;
    case LANE_HELLO:
        break;
    }
    return HANDOVER_LOST;
}

/* Take a whole frame. Returns the event that it is, HANDOVER_LOST if that is none for now. */
static enum handover_event open_frame(struct blackout *blackout)
{
    struct lane_frame frame;

    blackout->frame_bytes = 0;
    if (lane_open(blackout->lane, blackout->frame, &frame) != 0)
        return HANDOVER_LOST;
    enum handover_event event = event_of(blackout, &frame);
    return may(blackout, event) ? event : HANDOVER_LOST;
}

/* Read more of the next frame. Returns 0 once it is whole, -EAGAIN, or another negative errno.
 * sandbox: recvmsg */
static int read_frame(struct blackout *blackout)
{
    struct iovec vector = {blackout->frame + blackout->frame_bytes,
                           sizeof(blackout->frame) - blackout->frame_bytes};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};

    ssize_t n = recvmsg(blackout->lane_fd, &header, MSG_DONTWAIT);
    if (n < 0)
        return errno == EINTR ? -EAGAIN : -errno;
    if (n == 0)
        return -EPIPE;
    blackout->frame_bytes += (size_t)n;
    return blackout->frame_bytes < sizeof(blackout->frame) ? -EAGAIN : 0;
}

static void receive(struct blackout *blackout)
{
    int r = blackout->lane ? read_frame(blackout) : -EAGAIN;
    if (r == -EAGAIN)
        return;
    enum handover_event event = r == 0 ? open_frame(blackout) : HANDOVER_LOST;
    take(blackout, event);
}

static void start_tail(struct blackout *blackout)
{
    if (blackout->state != HANDOVER_STARTING)
        return;
    TPM_RESULT result = incoming_start(&blackout->incoming, blackout->tpm);
    if (result != TPM_SUCCESS)
        error_report("the tail is refused: libtpms does not start from it (%#x); the guest goes on "
                     "at the source: migrate again",
                     result);
    blackout->told.start_us = blackout->incoming.start_us;
    take(blackout, result == TPM_SUCCESS ? HANDOVER_READY : HANDOVER_NOT_READY);
}

void blackout_start_tail(struct blackout *blackout)
{
    locked(blackout);
    start_tail(blackout);
}

void blackout_receive(struct blackout *blackout)
{
    locked(blackout);
    start_tail(blackout); /* what is granted is a TPM that is there */
    if (!is_lane_in_use(blackout))
        receive(blackout);
}

bool blackout_is_armed(struct blackout *blackout)
{
    locked(blackout);
    return blackout->lane && blackout->is_source;
}

static bool has_gone_stale(const struct blackout *blackout)
{
    return handover_has_tail(blackout->state) &&
           clock_ms() - blackout->offered_ms > BLACKOUT_OFFER_MS;
}

bool blackout_give_tail(struct blackout *blackout, struct message *answer)
{
    locked(blackout);
    if (!may(blackout, HANDOVER_ASKED) || has_gone_stale(blackout))
        return false;
    if (tpm_has_worked(blackout->tpm)) {
        take(blackout, HANDOVER_RUNS);
        return false;
    }
    blackout->told = (struct link_handover){.tail_bytes = (uint32_t)blackout->tail_bytes};
    take(blackout, HANDOVER_ASKED);
    if (!handover_has_given(blackout->state))
        return false;
    answer->payload = blackout->tail;
    answer->header.payload_bytes = (uint32_t)blackout->tail_bytes;
    blackout->tail = NULL;
    return true;
}

/* Have what has come be what the tail ends at. Returns 0 or an enum link_tail. */
static int follow(struct blackout *blackout, const uint8_t *bytes, size_t n_bytes)
{
    cleanup(tail_deinit) struct tail tail = {0};
    struct incoming *incoming = &blackout->incoming;

    int r = tail_open(blackout->cipher, bytes, n_bytes, &tail);
    if (r != 0)
        return r < 0 ? LINK_TAIL_NOT_NEXT : r;
    if (incoming_follow(incoming, blackout->tpm, &tail) != TPM_SUCCESS)
        return LINK_TAIL_NOT_NEXT;
    blackout->digests = incoming->digests;
    blackout->told = (struct link_handover){
        .start_us = incoming->is_held ? incoming->start_us : 0,
        .permanent_generation = tail.permanent_to,
        .volatile_generation = tail.volatile_to,
    };
    return 0;
}

int blackout_take_tail(struct blackout *blackout, const uint8_t *tail, size_t tail_bytes)
{
    int64_t began_ns = clock_ns();

    locked(blackout);
    if (!blackout->lane || blackout->is_source || !may(blackout, HANDOVER_TAIL))
        return LINK_TAIL_UNEXPECTED;
    int r = follow(blackout, tail, tail_bytes);
    if (r != 0)
        return r;
    blackout->took_ns = clock_ns();
    blackout->told.apply_us = us_since(began_ns);
    take(blackout, HANDOVER_TAIL);
    return 0;
}

/* Wait for the other engine's word, here rather than in the link's thread, which would have to wake
 * this one. vtpmd may end the lane meanwhile: so each wait is short.
 * sandbox: poll|ppoll */
static void wait_for_frame(struct blackout *blackout, int64_t until_ms)
{
    struct pollfd entry = {.fd = blackout->lane_fd, .events = POLLIN};
    int64_t left_ms = until_ms - clock_ms();

    pthread_mutex_unlock(&blackout->lock);
    poll(&entry, 1, left_ms < WAIT_MS ? (int)left_ms : WAIT_MS);
    pthread_mutex_lock(&blackout->lock);
    receive(blackout);
}

static void wait_for_grant(struct blackout *blackout)
{
    int64_t until_ms = clock_ms() + BLACKOUT_GRANT_TIMEOUT_MS;

    while (blackout->state == HANDOVER_WAITING && clock_ms() < until_ms)
        wait_for_frame(blackout, until_ms);
    if (blackout->state == HANDOVER_WAITING)
        take(blackout, HANDOVER_TIMED_OUT);
}

bool blackout_init(struct blackout *blackout, TPM_RESULT *result)
{
    locked(blackout);
    if (!may(blackout, HANDOVER_INIT))
        return false;
    take(blackout, HANDOVER_INIT);
    wait_for_grant(blackout);
    *result = blackout->state == HANDOVER_STARTED ? TPM_SUCCESS : TPM_FAIL;
    if (*result != TPM_SUCCESS)
        error_report("INIT is refused: the source has not granted the vTPM; the guest goes on "
                     "there: migrate again");
    return true;
}

void blackout_runs(struct blackout *blackout)
{
    blackout_say(blackout, HANDOVER_RUNS);
}

static bool is_offered(struct blackout *blackout)
{
    enum handover_state state = blackout->state;

    return handover_has_tail(state) || handover_has_given(state);
}

void blackout_worked(struct blackout *blackout)
{
    if (!is_offered(blackout))
        return;
    locked(blackout);
    /* Not by what was captured before it was offered. */
    if (is_offered(blackout) && tpm_has_worked(blackout->tpm))
        take(blackout, HANDOVER_RUNS);
}
