/* What the engine makes of what a QEMU brings, or does not, before an INIT: each of the commands
 * about that in each state of arrival.h, on the control channel of an engine that is alone, with
 * the real libtpms. After it, an INIT shows what the TPM starts from.
 *
 * Invariant 2: what was refused is not replaced by what is here, for a guest that came with it.
 * Invariant 13: a vTPM only ever takes a state that is its own.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>
#include <libtpms/tpm_error.h>

#include "ask.h"
#include "blackout.h"
#include "bytes.h"
#include "commands.h"
#include "data.h"
#include "epoch.h"
#include "pages.h"
#include "swtpm_format.h"
#include "tpm_in_memory.h"

enum {
    STATES = ARRIVED_UNUSABLE + 1,
    REQUEST_BYTES = 16, /* of SET_STATEBLOB, without data */
    NO_DESCRIPTOR = -1,
    LATER = 1000, /* a generation */
    WAIT_MS = 10000,
};

static const char letters[] = "NBTU"; /* of states */

static const struct checkpoint_lineage later = {.identity = "this vTPM's own.",
                                                .generation = LATER},
                                       earlier = {.identity = "this vTPM's own.", .generation = 1},
                                       another = {.identity = "of another vTPM.",
                                                  .generation = LATER};

struct state {
    uint8_t bytes[IMAGE_BYTES_MAX];
    size_t n_bytes;
};

/* Of a TPM that is not the one of this host, as QEMU brings them; and of the one that is. */
static struct state permanent, volatile_state, own_volatile_state;

static struct data_channel *channel;
static struct blackout *blackout;
static struct asker *asker;
static struct commands commands;
static int guest_fd;

/* Have the engine carry out a request, as its server does. */
static TPM_RESULT carry_out(const uint8_t *request, size_t request_bytes, int descriptor)
{
    struct control control;
    struct control_event event;
    struct iovec *vectors;

    control_init(&control);
    control_receive(&control, request, request_bytes, &descriptor, descriptor >= 0);
    int verdict =
        control_next(&control, tpm_is_running(tpm) ? CONTROL_RUNNING : CONTROL_STOPPED, &event);
    assert_int_equal(verdict, CONTROL_REQUEST);
    commands_carry_out(&commands, &control, &event);
    assert_int_equal(control_output(&control, &vectors), 1);
    TPM_RESULT result = get_be32(vectors->iov_base);
    commands_answered(&commands);
    control_deinit(&control);
    return result;
}

static TPM_RESULT init(uint32_t flags)
{
    uint8_t request[8];

    put_be32(request, CONTROL_INIT);
    put_be32(request + 4, flags);
    return carry_out(request, sizeof(request), NO_DESCRIPTOR);
}

static TPM_RESULT set_blob(uint32_t type, const struct iovec *pieces, size_t n_pieces)
{
    static uint8_t request[REQUEST_BYTES + CONTROL_BLOB_BYTES_MAX];
    size_t n_bytes = 0;

    for (size_t i = 0; i < n_pieces; i++) {
        memcpy(request + REQUEST_BYTES + n_bytes, pieces[i].iov_base, pieces[i].iov_len);
        n_bytes += pieces[i].iov_len;
    }
    put_be32(request, CONTROL_SET_STATEBLOB);
    put_be32(request + 4, 0);
    put_be32(request + 8, type);
    put_be32(request + 12, (uint32_t)n_bytes);
    return carry_out(request, REQUEST_BYTES + n_bytes, NO_DESCRIPTOR);
}

static TPM_RESULT set_state(uint32_t type, const void *state, size_t state_bytes,
                            const struct checkpoint_lineage *lineage)
{
    struct iovec pieces[SWTPM_PIECES];
    struct swtpm_wrapped wrapped;

    assert_int_equal(swtpm_wrap(SWTPM_BLOB, NULL, state, state_bytes, lineage, &wrapped), 0);
    swtpm_wrapped_pieces(&wrapped, pieces);
    TPM_RESULT result = set_blob(type, pieces, SWTPM_PIECES);
    swtpm_wrapped_deinit(&wrapped);
    return result;
}

static TPM_RESULT set_permanent(const struct checkpoint_lineage *lineage)
{
    return set_state(LINK_STATE_PERMANENT, permanent.bytes, permanent.n_bytes, lineage);
}

/* The commands. */

static TPM_RESULT do_connect(void)
{
    const uint8_t request[] = {0, 0, 0, CONTROL_SET_DATAFD};
    int fds[2];

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
    guest_fd = fds[0];
    return carry_out(request, sizeof(request), fds[1]);
}

static TPM_RESULT do_stop(void)
{
    const uint8_t request[] = {0, 0, 0, CONTROL_STOP};

    return carry_out(request, sizeof(request), NO_DESCRIPTOR);
}

static TPM_RESULT do_tail(void)
{
    static char tail[] = "VTPMTAIL and more";

    return set_blob(LINK_STATE_PERMANENT, &(struct iovec){tail, sizeof(tail)}, 1);
}

static TPM_RESULT do_later(void)
{
    return set_permanent(&later);
}

static TPM_RESULT do_earlier(void)
{
    return set_permanent(&earlier);
}

static TPM_RESULT do_nameless(void)
{
    return set_permanent(NULL);
}

static TPM_RESULT do_another(void)
{
    return set_permanent(&another);
}

/* libtpms takes it only with the permanent state that it goes with. */
static TPM_RESULT do_volatile(void)
{
    const struct state *image =
        commands.arrival.what == ARRIVED_BLOBS ? &volatile_state : &own_volatile_state;

    return set_state(LINK_STATE_VOLATILE, image->bytes, image->n_bytes, NULL);
}

static TPM_RESULT do_refused(void)
{
    return set_state(LINK_STATE_PERMANENT, "no state", 8, &later);
}

static TPM_RESULT do_refused_volatile(void)
{
    return set_state(LINK_STATE_VOLATILE, "no state", 8, NULL);
}

static TPM_RESULT do_no_blob(void)
{
    static char bytes[] = "no blob";

    return set_blob(LINK_STATE_VOLATILE, &(struct iovec){bytes, sizeof(bytes)}, 1);
}

static TPM_RESULT do_init(void)
{
    return init(0);
}

static TPM_RESULT do_init_incoming(void)
{
    return init(CONTROL_INIT_DELETE_VOLATILE);
}

static TPM_RESULT do_init_and_fail(void)
{
    io.fail_from = io.calls + 1;
    TPM_RESULT result = init(CONTROL_INIT_DELETE_VOLATILE);
    io.fail_from = 0;
    return result;
}

/* What is answered in each state, and the state then: done, refused by the engine with TPM_FAIL or
 * TPM_BAD_PARAMETER, or with what libtpms says. Of a TPM that this QEMU has started before, where
 * that makes a difference. */
static const struct row {
    const char *name;
    TPM_RESULT (*function)(void);
    char answers[STATES + 1], then[STATES + 1], answers_started[STATES + 1],
        then_started[STATES + 1];
} rows[] = {
    /*                                        NBTU    NBTU    NBTU    NBTU */
    {"SET_DATAFD", do_connect, "dddd", "NNNN", "", ""},
    {"STOP", do_stop, "dddd", "NNNN", "", ""},
    {"a tail", do_tail, "pppp", "TUUU", "", ""},
    {"a blob", do_later, "ddfd", "BBTB", "", ""},
    {"an older blob", do_earlier, "ddfd", "BBTB", "", ""},
    {"a blob of nobody knows whom", do_nameless, "ddfd", "BBTB", "", ""},
    {"another vTPM's blob", do_another, "ffff", "UUTU", "ddfd", "BBTB"},
    {"a volatile blob", do_volatile, "ddfd", "NBTU", "", ""},
    {"a blob that libtpms refuses", do_refused, "rrfr", "UUTU", "", ""},
    {"a volatile blob that libtpms refuses", do_refused_volatile, "rrfr", "UUTU", "", ""},
    {"what is no blob", do_no_blob, "ppfp", "UUTU", "", ""},
    {"INIT", do_init, "dddd", "NNTU", "", ""},
    {"INIT, incoming", do_init_incoming, "ddff", "NNTU", "", ""},
    {"INIT, incoming, with a broken disk", do_init_and_fail, "dfff", "NUTU", "", ""},
};

static void begin(void)
{
    tpm_in_memory_begin();
    assert_int_equal(asker_new(&asker), 0);
    asker_be_alone(asker);
    assert_int_equal(blackout_new(&blackout, tpm, asker, NULL), 0);
    assert_int_equal(data_channel_new(&channel, tpm, blackout), 0);
    data_channel_begin(channel);
    commands = (struct commands){
        .tpm = tpm,
        .store = store,
        .channel = channel,
        .asker = asker,
        .blackout = blackout,
    };
    commands.answer.tail = MESSAGE_NONE;
    guest_fd = -1;
}

static void end(void)
{
    if (guest_fd >= 0)
        close(guest_fd);
    data_channel_free(channel);
    blackout_free(blackout);
    asker_free(asker);
    tpm_in_memory_end();
}

static uint32_t execute(uint8_t *command, size_t command_bytes)
{
    struct tpm_response response;

    tpm_response_init(&response);
    tpm_execute(tpm, command, command_bytes, &response);
    uint32_t code = get_be32(response.bytes + 6);
    tpm_response_deinit(&response);
    return code;
}

/* Power the TPM on for the first time, and start it as its guest does. */
static void start_new(void)
{
    uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};

    assert_int_equal(do_init(), TPM_SUCCESS);
    assert_int_equal(execute(startup, sizeof(startup)), 0);
}

/* Take a state out of the TPM, which runs. */
static void take(enum link_state_type type, struct state *image)
{
    uint8_t *state;

    assert_int_equal(tpm_get_state(tpm, type, &state, &image->n_bytes), TPM_SUCCESS);
    assert_true(image->n_bytes <= sizeof(image->bytes));
    memcpy(image->bytes, state, image->n_bytes);
    free(state);
}

/* Make a TPM's state that others bring. */
static int set_up(void **state)
{
    (void)state;
    begin();
    start_new();
    take(LINK_STATE_VOLATILE, &volatile_state);
    take(LINK_STATE_PERMANENT, &permanent);
    end();
    return 0;
}

/* Bring a new engine there, whose directory has a TPM of its own. */
static void enter(enum arrived what, bool has_started)
{
    begin();
    start_new();
    take(LINK_STATE_VOLATILE, &own_volatile_state);
    assert_int_equal(do_stop(), TPM_SUCCESS);
    if (!has_started)
        arrival_begin(&commands.arrival, tpm);
    if (what == ARRIVED_BLOBS)
        assert_int_equal(do_later(), TPM_SUCCESS);
    if (what == ARRIVED_TAIL || what == ARRIVED_UNUSABLE)
        assert_int_equal(do_tail(), TPM_BAD_PARAMETER);
    if (what == ARRIVED_UNUSABLE)
        assert_int_equal(do_tail(), TPM_BAD_PARAMETER);
    assert_int_equal(commands.arrival.what, what);
    assert_int_equal(commands.arrival.has_started, has_started);
}

static char letter_of(TPM_RESULT result)
{
    switch (result) {
    case TPM_SUCCESS:
        return 'd';
    case TPM_FAIL:
        return 'f';
    case TPM_BAD_PARAMETER:
        return 'p';
    default:
        return 'r';
    }
}

/* Whether the TPM runs from what QEMU has brought, and not from what the directory holds. */
static bool is_from_blobs(void)
{
    static struct state now;

    take(LINK_STATE_PERMANENT, &now);
    return now.n_bytes == permanent.n_bytes && memcmp(now.bytes, permanent.bytes, now.n_bytes) == 0;
}

/* Start the TPM for a guest that came with a stream, or, where that is refused, for another. */
static void start(enum arrived what)
{
    bool may = what == ARRIVED_NOTHING || what == ARRIVED_BLOBS;

    if (tpm_is_running(tpm))
        return;
    assert_int_equal(do_init_incoming(), may ? TPM_SUCCESS : TPM_FAIL);
    if (!may)
        assert_int_equal(do_init(), TPM_SUCCESS);
}

static void try_cell(const struct row *row, enum arrived what, bool has_started)
{
    bool differs = has_started && row->answers_started[0];
    char answer = (differs ? row->answers_started : row->answers)[what];
    char then = (differs ? row->then_started : row->then)[what];

    enter(what, has_started);
    char seen = letter_of(row->function());
    char seen_then = letters[commands.arrival.what];
    if (seen != answer || seen_then != then)
        fail_msg("%s in %c, %s: %c %c, not %c %c", row->name, letters[what],
                 has_started ? "started before" : "not started before", seen, seen_then, answer,
                 then);
    bool is_on = tpm_is_running(tpm);
    enum arrived from = is_on ? what : commands.arrival.what;
    start(from);
    if (is_from_blobs() != (from == ARRIVED_BLOBS))
        fail_msg("%s in %c: the TPM starts from something else", row->name, letters[what]);
    end();
}

static void every_command_in_every_state_does_what_its_row_says(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
        for (enum arrived what = ARRIVED_NOTHING; what <= ARRIVED_UNUSABLE; what++) {
            try_cell(&rows[i], what, false);
            try_cell(&rows[i], what, true);
        }
    }
}

/* Whether the TPM was on before its guest's TPM2_Startup: it resumed. */
static bool has_resumed(void)
{
    uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};

    return execute(get_random, sizeof(get_random)) == 0;
}

static void a_volatile_blob_goes_with_the_rest(void **state)
{
    TPM_RESULT (*const ends[])(void) = {NULL, do_stop, do_connect, do_refused_volatile, do_tail};

    (void)state;
    for (size_t i = 0; i < sizeof(ends) / sizeof(*ends); i++) {
        enter(ARRIVED_NOTHING, false);
        assert_int_equal(do_volatile(), TPM_SUCCESS);
        if (ends[i])
            ends[i]();
        assert_int_equal(do_init(), TPM_SUCCESS);
        assert_int_equal(has_resumed(), !ends[i]);
        end();
    }
}

static void what_has_come_is_of_its_own_lineage_from_then_on(void **state)
{
    const struct checkpoint_lineage *const lineages[] = {&later, &earlier, &another};
    struct checkpoint_lineage before, after;

    (void)state;
    for (size_t i = 0; i < sizeof(lineages) / sizeof(*lineages); i++) {
        enter(ARRIVED_NOTHING, true);
        assert_true(tpm_get_lineage(tpm, &before));
        assert_int_equal(set_permanent(lineages[i]), TPM_SUCCESS);
        assert_int_equal(do_init(), TPM_SUCCESS);
        assert_true(tpm_get_lineage(tpm, &after));
        assert_memory_equal(after.identity, lineages[i]->identity, sizeof(after.identity));
        /* It is the state that it was, or put back: then it is a new one. */
        if (lineages[i] == &later)
            assert_int_equal(after.generation, later.generation);
        else
            assert_true(after.generation > lineages[i]->generation);
        assert_true(after.generation > before.generation);
        /* What is not later than what was here begins the next restore epoch. */
        assert_int_equal(epoch_of(after.generation), lineages[i] != &later);
        end();
    }
}

static void an_older_state_is_told_if_it_runs(void **state)
{
    struct arrival *arrival = &commands.arrival;
    struct blob_content content = {.state = permanent.bytes, .has_lineage = true};
    struct checkpoint_lineage before;
    struct link_restored restored;
    uint32_t epoch;

    (void)state;
    content.state_bytes = permanent.n_bytes;
    enter(ARRIVED_NOTHING, true);
    assert_true(tpm_get_lineage(tpm, &before));
    /* The same one is older if it differs; where nothing does, no epoch begins. */
    for (uint64_t back = 0; back < 2; back++) {
        content.lineage = before;
        content.lineage.generation -= back;
        assert_int_equal(arrival_take_blob(arrival, tpm, LINK_STATE_PERMANENT, &content), 0);
        assert_int_equal(arrival_start(arrival, tpm, store), TPM_SUCCESS);
        assert_true(arrival_end(arrival, tpm, TPM_SUCCESS, true, &restored, &epoch));
        assert_int_equal(restored.generation, content.lineage.generation);
        assert_int_equal(restored.newest, before.generation);
        assert_int_equal(epoch, back == 0 ? epoch_of(before.generation) + 1 : 0);
        assert_int_equal(do_stop(), TPM_SUCCESS);
        assert_true(tpm_get_lineage(tpm, &before));
    }
    /* What is refused does not run, and is not told of what does. */
    assert_int_not_equal(do_refused(), TPM_SUCCESS);
    assert_int_equal(arrival->what, ARRIVED_UNUSABLE);
    assert_int_equal(arrival_start(arrival, tpm, store), TPM_SUCCESS);
    assert_false(arrival_end(arrival, tpm, TPM_SUCCESS, false, &restored, &epoch));
    end();
}

/* What is here comes once more: nothing is put back. */
static void the_same_state_is_not_told_as_older(void **state)
{
    static struct state own;
    struct checkpoint_lineage before, after;
    struct blob_content content = {.state = own.bytes, .has_lineage = true};
    struct link_restored restored;
    uint32_t epoch;

    (void)state;
    enter(ARRIVED_NOTHING, true);
    assert_int_equal(do_init(), TPM_SUCCESS);
    take(LINK_STATE_PERMANENT, &own);
    content.state_bytes = own.n_bytes;
    assert_true(tpm_get_lineage(tpm, &before));
    assert_int_equal(do_stop(), TPM_SUCCESS);
    content.lineage = before;
    assert_int_equal(arrival_take_blob(&commands.arrival, tpm, LINK_STATE_PERMANENT, &content), 0);
    assert_int_equal(arrival_start(&commands.arrival, tpm, store), TPM_SUCCESS);
    assert_false(arrival_end(&commands.arrival, tpm, TPM_SUCCESS, true, &restored, &epoch));
    assert_int_equal(epoch, 0);
    assert_true(tpm_get_lineage(tpm, &after));
    assert_int_equal(after.generation, before.generation);
    end();
}

/* swtpm's, or of when swtpm served: only a QEMU that has started the TPM loads a snapshot. */
static void a_snapshot_of_nobody_knows_whom_begins_an_epoch(void **state)
{
    struct checkpoint_lineage before, after;

    (void)state;
    for (int has_started = 0; has_started <= 1; has_started++) {
        enter(ARRIVED_NOTHING, has_started);
        assert_true(tpm_get_lineage(tpm, &before));
        assert_int_equal(set_permanent(NULL), TPM_SUCCESS);
        assert_int_equal(do_init_incoming(), TPM_SUCCESS);
        assert_true(tpm_get_lineage(tpm, &after));
        assert_memory_equal(after.identity, before.identity, sizeof(after.identity));
        assert_int_equal(epoch_of(after.generation), has_started);
        end();
    }
}

/* As long as nothing ran it is what it was where it has come from, and gets no TPM2_Shutdown; where
 * its guest is reset, it runs here, and that is made up for. */
static void what_has_come_is_shut_down_once_it_is_used(void **state)
{
    struct checkpoint_lineage now;

    (void)state;
    for (int is_used = 0; is_used <= 1; is_used++) {
        begin();
        assert_int_equal(do_connect(), TPM_SUCCESS);
        assert_int_equal(set_permanent(&later), TPM_SUCCESS);
        assert_int_equal(do_volatile(), TPM_SUCCESS);
        assert_int_equal(do_init_incoming(), TPM_SUCCESS);
        if (is_used)
            assert_true(has_resumed());
        assert_int_equal(do_stop(), TPM_SUCCESS);
        assert_true(tpm_get_lineage(tpm, &now));
        assert_int_equal(now.generation > later.generation, is_used);
        assert_int_equal(do_init(), TPM_SUCCESS);
        assert_true(tpm_get_lineage(tpm, &now));
        assert_true(now.generation > later.generation);
        end();
    }
}

enum {
    MAKE_CALLS = 3, /* a file, but for its name */
    PUBLISH_CALLS = 2,
};

static bool has_temporary(void)
{
    const uint8_t *bytes;
    size_t n_bytes;

    return io_memory_read(&io, "TMP2-00.permall", &bytes, &n_bytes);
}

static void bring_and_wait(void)
{
    assert_int_equal(set_permanent(&later), TPM_SUCCESS);
    for (int ms = 0; ms < WAIT_MS && io_memory_calls(&io) < MAKE_CALLS; ms++)
        usleep(1000);
    assert_true(has_temporary());
}

static void wait_until_removed(void)
{
    for (int ms = 0; ms < WAIT_MS && has_temporary(); ms++)
        usleep(1000);
    assert_false(has_temporary());
}

/* To an empty directory, as a migration does: the file is the very one that INIT would write. */
static void what_is_brought_is_written_before_its_init(void **state)
{
    const struct checkpoint_lineage *const lineages[] = {&later, &another, NULL};
    struct checkpoint_lineage after;

    (void)state;
    for (size_t i = 0; i < sizeof(lineages) / sizeof(*lineages); i++) {
        begin();
        assert_int_equal(do_connect(), TPM_SUCCESS);
        assert_int_equal(set_permanent(lineages[i]), TPM_SUCCESS);
        assert_int_equal(do_volatile(), TPM_SUCCESS);
        assert_int_equal(do_init_incoming(), TPM_SUCCESS);
        assert_int_equal(io.calls, MAKE_CALLS + PUBLISH_CALLS);
        assert_true(is_from_blobs() && has_resumed());
        assert_true(tpm_get_lineage(tpm, &after));
        assert_true(!lineages[i] || after.generation == lineages[i]->generation);
        end();
    }
}

static TPM_RESULT do_disconnect(void)
{
    commands_disconnected(&commands);
    return TPM_SUCCESS;
}

static void what_is_brought_in_vain_leaves_no_file(void **state)
{
    TPM_RESULT(*const ends[])
    (void) = {do_stop, do_connect, do_tail, do_refused, do_refused_volatile, do_disconnect};

    (void)state;
    for (size_t i = 0; i < sizeof(ends) / sizeof(*ends); i++) {
        begin();
        bring_and_wait();
        ends[i]();
        wait_until_removed();
        assert_int_equal(do_init(), TPM_SUCCESS);
        assert_false(has_temporary());
        end();
    }
}

/* Not even beside its files. */
static void what_comes_to_another_hosts_vtpm_is_not_written_before_its_init(void **state)
{
    enum { LONG_ENOUGH_US = 50000 };

    (void)state;
    begin();
    assert_int_equal(tpm_stop_fenced(tpm), TPM_SUCCESS);
    assert_int_equal(tpm_set_come(tpm, &later, permanent.bytes, permanent.n_bytes), TPM_SUCCESS);
    usleep(LONG_ENOUGH_US);
    assert_int_equal(io_memory_calls(&io), 0);
    assert_int_equal(tpm_init_come(tpm, &later), TPM_SUCCESS);
    assert_int_equal(io.calls, MAKE_CALLS + PUBLISH_CALLS);
    end();
}

/* Its INIT fails as it gives the file its name. */
static void what_is_brought_and_fails_leaves_no_file(void **state)
{
    (void)state;
    begin();
    bring_and_wait();
    io.fail_from = MAKE_CALLS + 1;
    io.fail_to = io.fail_from + 1;
    assert_int_equal(do_init_incoming(), TPM_FAIL);
    assert_int_equal(commands.arrival.what, ARRIVED_UNUSABLE);
    assert_false(has_temporary());
    assert_int_equal(do_init(), TPM_SUCCESS);
    assert_false(is_from_blobs());
    end();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_command_in_every_state_does_what_its_row_says),
        cmocka_unit_test(a_volatile_blob_goes_with_the_rest),
        cmocka_unit_test(what_has_come_is_of_its_own_lineage_from_then_on),
        cmocka_unit_test(an_older_state_is_told_if_it_runs),
        cmocka_unit_test(the_same_state_is_not_told_as_older),
        cmocka_unit_test(a_snapshot_of_nobody_knows_whom_begins_an_epoch),
        cmocka_unit_test(what_has_come_is_shut_down_once_it_is_used),
        cmocka_unit_test(what_is_brought_is_written_before_its_init),
        cmocka_unit_test(what_is_brought_in_vain_leaves_no_file),
        cmocka_unit_test(what_is_brought_and_fails_leaves_no_file),
        cmocka_unit_test(what_comes_to_another_hosts_vtpm_is_not_written_before_its_init),
    };

    return cmocka_run_group_tests(tests, set_up, NULL);
}
