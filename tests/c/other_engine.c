#include "other_engine.h"

#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bytes.h"
#include "check.h"
#include "staged.h"
#include "tpm.h"
#include "tpm_in_memory.h"

const struct lane_keying a_session = {
    .session = "a session of 16",
    .key = "a key of 32 bytes, which is sent",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
    .is_greeted = true,
};
const struct lane_keying another_session = {
    .session = "a session after",
    .key = "another key, which is sent, too",
    .uuid = "uuid of a guest",
    .lineage = "a lineage of 16",
    .is_greeted = true,
};

struct blackout *blackout;
int other_fd;
struct io *record_io;

static struct lane *lane;
static struct tail_cipher *cipher;

static void disconnect(void)
{
    lane_free(lane);
    lane = NULL;
    tail_cipher_free(cipher);
    cipher = NULL;
    close_descriptor(&other_fd);
}

void other_engine_begin(void)
{
    other_engine_begin_with(VERSION_2_0);
}

void other_engine_begin_with(enum version_number version)
{
    tpm_in_memory_begin();
    check(tpm_set_version(tpm, version) == TPM_SUCCESS);
    check(tpm_init(tpm, false) == TPM_SUCCESS);
    guest_starts_up();
    check(blackout_new(&blackout, tpm, NULL, record_io) == 0);
    other_fd = -1;
}

void other_engine_end(void)
{
    disconnect();
    blackout_free(blackout);
    tpm_in_memory_end();
    version_set(VERSION_2_0);
}

void other_engine_connect(const struct lane_keying *keying, bool is_source)
{
    int ends[2];

    disconnect();
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    check(blackout_set_lane(blackout, ends[0], keying, is_source) == TPM_SUCCESS);
    other_fd = ends[1];
    check(lane_new(&lane, keying, !is_source) == 0);
    check(tail_cipher_new(&cipher, keying) == 0);
}

void other_engine_sends(const struct lane_frame *frame)
{
    uint8_t bytes[LANE_FRAME_BYTES];

    check(lane_seal(lane, frame, bytes) == 0);
    check(write(other_fd, bytes, sizeof(bytes)) == (ssize_t)sizeof(bytes));
}

void other_engine_says(const struct lane_frame *frame)
{
    uint8_t bytes[LANE_FRAME_BYTES];

    check(lane_seal(lane, frame, bytes) == 0);
    check(write(other_fd, bytes, 10) == 10);
    blackout_receive(blackout);
    check(write(other_fd, bytes + 10, sizeof(bytes) - 10) == (ssize_t)sizeof(bytes) - 10);
    blackout_receive(blackout);
}

void other_engine_takes(const struct link_digests *digests)
{
    struct lane_frame frame = {.kind = LANE_TAKE};

    memcpy(frame.permanent_digest, digests->permanent_digest, LANE_DIGEST_BYTES);
    memcpy(frame.volatile_digest, digests->volatile_digest, LANE_DIGEST_BYTES);
    other_engine_says(&frame);
}

int other_engine_hears(enum lane_kind kinds[4], struct lane_frame *take)
{
    uint8_t bytes[LANE_FRAME_BYTES];
    struct lane_frame frame;
    int n;

    for (n = 0; n < 3; n++) {
        ssize_t got = recv(other_fd, bytes, sizeof(bytes), MSG_DONTWAIT | MSG_WAITALL);
        kinds[n] = got == 0 ? 0 : LANE_HELLO; /* HELLO: nothing yet */
        if (got <= 0)
            break;
        check(lane_open(lane, bytes, &frame) == 0);
        kinds[n] = frame.kind;
        if (take && frame.kind == LANE_TAKE)
            *take = frame;
    }
    return n;
}

struct sealed_tail other_engine_seals_records(const struct guest_states *from,
                                              const struct guest_states *to,
                                              const struct staged_records *records)
{
    struct sealed_tail sealed;
    struct tail tail = {
        .permanent_from = from->of[0].generation,
        .permanent_to = to->of[0].generation,
        .volatile_from = from->of[1].generation,
        .volatile_to = to->of[1].generation,
        .power = (uint8_t)to->said,
        .records = *records,
    };

    check(tail_seal(cipher, &tail, &sealed.bytes, &sealed.n_bytes) == 0);
    return sealed;
}

struct sealed_tail other_engine_seals(const struct guest_states *from,
                                      const struct guest_states *to)
{
    struct staged_records records = guest_states_encode(from, to);
    struct sealed_tail sealed = other_engine_seals_records(from, to, &records);

    guest_records_free(&records);
    return sealed;
}

struct tail other_engine_opens(const uint8_t *bytes, size_t n_bytes)
{
    struct tail tail;

    check(tail_open(cipher, bytes, n_bytes, &tail) == 0);
    return tail;
}

TPM_RESULT other_engine_brings(const struct guest_states *from, const struct guest_states *to,
                               bool is_last)
{
    struct staged_records records = guest_states_encode(from, to);

    TPM_RESULT result = blackout_stage(blackout, &records, is_last ? &to->said : NULL);
    guest_records_free(&records);
    return result;
}

void power_off(void)
{
    tpm_run_on(tpm);
    check(tpm_stop(tpm) == TPM_SUCCESS);
}
