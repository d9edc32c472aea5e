/* A guest that stops in the middle of a command, again and again, with the real libtpms.
 *
 *     race_long_command RACES
 *
 * Three threads: one executes the guest's command, one abandons it and captures the state, and the
 * TPM's own computes. Each command makes an object, and every other one changes NV, too. Invariant:
 * a command is wholly done and answered, or wholly undone. Answered with success, its object is in
 * the state that is captured then and in the TPM, and its change of NV is durable. Answered with
 * TPM_RC_RETRY, neither is, and no file has changed.
 *
 * When to abandon it is found by trying, so that either wins about as often on any machine.
 *
 * Exit status: 0 if that held in all races, 1 if not, 2 for wrong usage.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <libtpms/tpm_error.h>

#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "io_memory.h"
#include "long_command.h"
#include "pages.h"
#include "tpm.h"

enum {
    NAME_BYTES = 34, /* of an object: u16 algorithm, SHA-256 */
    RC_REFERENCE_H0 = 0x910,
    RC_AUTH_FAIL = 0x98e,
    DELAY_NS_MAX = 10 * NS_PER_MS,
};

#define COMMAND(literal) ((struct command){literal, sizeof(literal) - 1})
#define STARTUP_CLEAR COMMAND("\x80\x01\0\0\0\x0c\0\0\x01\x44\0\0")
/* TPM2_CreatePrimary(owner): an HMAC key. */
#define CREATE_PRIMARY                                                                             \
    COMMAND("\x80\x02\0\0\0\x39\0\0\x01\x31\x40\0\0\x01\0\0\0\x09\x40\0\0\x09\0\0\0\0\0"           \
            "\0\x04\0\0\0\0"                                                                       \
            "\0\x10\0\x08\0\x0b\0\x04\0\x72\0\0\0\x05\0\x0b\0\0"                                   \
            "\0\0\0\0\0\0")
#define HMAC_WITH_WRONG_PASSWORD                                                                   \
    COMMAND("\x80\x02\0\0\0\x21\0\0\x01\x55\x80\0\0\0\0\0\0\x0a\x40\0\0\x09\0\0\0\0\1x"            \
            "\0\1a\0\x0b")
#define FLUSH_FIRST COMMAND("\x80\x01\0\0\0\x0e\0\0\x01\x65\x80\0\0\0")
#define READ_PUBLIC COMMAND("\x80\x01\0\0\0\x0e\0\0\x01\x73\x80\0\0\0")

struct command {
    const char *bytes;
    size_t n_bytes;
};

static struct io_memory io;
static struct store *own_store, *store;
static struct tpm *tpm;
static atomic_int hours_passed;
static pthread_barrier_t barrier;
static struct tpm_response answer; /* the guest's, between the barriers */
static uint8_t name[NAME_BYTES];   /* of the object, which is the same one each time */
static bool is_over;
static struct {
    unsigned done, committed, abandoned;
} count;

/* Takes the C library's place: a TPM forgets a wrong password when hours have passed. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    static int (*real)(clockid_t, struct timespec *);

    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(clock, now);
    now->tv_sec += hours_passed * 60 * 60;
    return r;
}

static uint32_t execute(struct command command, struct tpm_response *response)
{
    uint8_t bytes[64];

    check(command.n_bytes <= sizeof(bytes));
    memcpy(bytes, command.bytes, command.n_bytes);
    tpm_execute(tpm, bytes, command.n_bytes, response);
    return get_be32(response->bytes + TPM_AT_CODE);
}

static uint32_t code_of(struct command command)
{
    struct tpm_response response;

    tpm_response_init(&response);
    uint32_t code = execute(command, &response);
    tpm_response_deinit(&response);
    return code;
}

static void capture(void)
{
    enum link_shutdown said;
    bool worked;

    check(tpm_capture(tpm, store, &worked, &said) == TPM_SUCCESS);
}

static bool captured_has_object(void)
{
    static uint8_t image[IMAGE_BYTES_MAX];
    uint64_t generation;
    size_t n_bytes;

    check(store_read(store, LINK_STATE_VOLATILE, image, &n_bytes, &generation) == 0);
    return memmem(image, n_bytes, name, NAME_BYTES) != NULL;
}

static void *run_guest(void *argument)
{
    (void)argument;
    for (;;) {
        pthread_barrier_wait(&barrier);
        if (is_over)
            return NULL;
        execute(CREATE_PRIMARY, &answer);
        pthread_barrier_wait(&barrier);
    }
}

/* Not all of this time is asked for: what is under way is to go on. */
static void spin(int64_t ns)
{
    int64_t until_ns = clock_ns() + ns;

    while (clock_ns() < until_ns) {
    }
}

static void have_the_command_commit(void)
{
    check(code_of(CREATE_PRIMARY) == 0);
    while (code_of(HMAC_WITH_WRONG_PASSWORD) != RC_AUTH_FAIL) {
    }
    check(code_of(FLUSH_FIRST) == 0);
    hours_passed += 2;
}

/* Stop the guest after this time. Returns true if its command was abandoned. */
static bool race(int64_t delay_ns)
{
    pthread_barrier_wait(&barrier);
    spin(delay_ns);
    tpm_abandon(tpm);
    enum long_phase phase = long_command_phase();
    capture(); /* as a round does it: the command may run, or not have come yet */
    pthread_barrier_wait(&barrier);
    uint32_t code = get_be32(answer.bytes + TPM_AT_CODE);
    check(code == 0 || code == TPM2_RC_RETRY);
    count.committed += phase == LONG_COMMITTING;
    check(phase != LONG_COMMITTING || code == 0);
    check((phase != LONG_ABANDONED && phase != LONG_SPENT) || code == TPM2_RC_RETRY);
    return code == TPM2_RC_RETRY;
}

static void see_what_happened(bool was_abandoned, bool commits, const uint8_t *before,
                              size_t n_before)
{
    const uint8_t *after;
    size_t n_after;

    check(io_memory_read_durable(&io, "tpm2-00.permall", &after, &n_after));
    bool is_same = n_after == n_before && memcmp(after, before, n_after) == 0;
    check(is_same == (was_abandoned || !commits));
    capture();
    check(captured_has_object() != was_abandoned);
    check(code_of(READ_PUBLIC) == (was_abandoned ? RC_REFERENCE_H0 : 0));
    if (!was_abandoned)
        check(code_of(FLUSH_FIRST) == 0);
}

static void race_once(unsigned number)
{
    static int64_t delay_ns = 20 * NS_PER_US;
    bool commits = number % 2;
    const uint8_t *file;
    size_t n_file;

    if (commits)
        have_the_command_commit();
    check(io_memory_read_durable(&io, "tpm2-00.permall", &file, &n_file));
    uint8_t *before = malloc(n_file);
    check(before);
    memcpy(before, file, n_file);
    bool was_abandoned = race(delay_ns);
    see_what_happened(was_abandoned, commits, before, n_file);
    free(before);
    count.done += !was_abandoned;
    count.abandoned += was_abandoned;
    delay_ns += was_abandoned ? delay_ns / 8 + 1 : -(delay_ns / 8);
    if (delay_ns > DELAY_NS_MAX)
        delay_ns = DELAY_NS_MAX;
}

static void begin(void)
{
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    TPMLIB_SetDebugFD(open("/dev/null", O_WRONLY)); /* each abandoned commit would be some lines */
    check(store_new(&own_store) == 0 && store_map(&store, store_fd(own_store), true) == 0);
    check(tpm_start_long_commands(tpm) == 0);
    check(tpm_init(tpm, false) == TPM_SUCCESS);
    tpm_response_init(&answer);
    check(execute(STARTUP_CLEAR, &answer) == 0);
    check(execute(CREATE_PRIMARY, &answer) == 0);
    check(execute(READ_PUBLIC, &answer) == 0);
    /* u16 and the public area, then u16 and the name */
    size_t at = TPM_HEADER_BYTES + 2U + get_be16(answer.bytes + TPM_HEADER_BYTES);
    check(get_be16(answer.bytes + at) == NAME_BYTES);
    memcpy(name, answer.bytes + at + 2, NAME_BYTES);
    check(code_of(FLUSH_FIRST) == 0);
    check(tpm_arm(tpm, true) == TPM_SUCCESS);
}

static void end(void)
{
    tpm_response_deinit(&answer);
    tpm_free(tpm);
    store_free(store);
    store_free(own_store);
    io_memory_deinit(&io);
}

int main(int n_arguments, char **arguments)
{
    unsigned n_races = n_arguments == 2 ? (unsigned)strtoul(arguments[1], NULL, 10) : 0;
    pthread_t guest;

    if (n_races == 0) {
        fprintf(stderr, "usage: race_long_command RACES\n");
        return 2;
    }
    begin();
    check(pthread_barrier_init(&barrier, NULL, 2) == 0);
    check(pthread_create(&guest, NULL, run_guest, NULL) == 0);
    for (unsigned i = 0; i < n_races; i++)
        race_once(i);
    is_over = true;
    pthread_barrier_wait(&barrier);
    pthread_join(guest, NULL);
    pthread_barrier_destroy(&barrier);
    end();
    printf("%u races: %u done, %u of them in the middle of a commit; %u abandoned\n", n_races,
           count.done, count.committed, count.abandoned);
    check(n_races < 100 || (count.done > 0 && count.abandoned > 0));
    return 0;
}
