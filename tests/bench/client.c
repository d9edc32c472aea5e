/*
 * Measures the round trip of TPM commands on the data sockets of running emulators.
 *
 *     client ROUNDS SAMPLES CLIENT_CORE ECHO_CORE COMMANDS NAME=DESCRIPTOR...
 *
 * One sample is the time from the first byte sent to the last byte received of all COMMANDS
 * (hexadecimal, separated by commas), one after the other. There may be several such lists, with
 * slashes between them: they take turns, so that each write finds something else. The emulators,
 * each a data socket that was inherited, and an echo process, which is the floor, take turns in
 * ROUNDS short rounds of SAMPLES, so that noise hits all alike. This process stays on CLIENT_CORE
 * and the echo process on ECHO_CORE, where the emulators should run as well: a wake-up on one core
 * and one across cores differ tenfold, and a scheduler that chose differently for two emulators
 * would hide what is compared.
 *
 * Writes a line of JSON for each emulator and for the echo process. Exit status: 0 measured, 1 a
 * command failed, 2 usage.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    MESSAGE_BYTES_MAX = 4096, /* of a command or response: QEMU's TIS has room for no more */
    HEADER_BYTES = 10,        /* tag, size, code of a TPM command or response */
    COMMANDS_MAX = 8,
    LISTS_MAX = 2,
    SUBJECTS_MAX = 8,
    ROUNDS_MAX = 10000,
    SAMPLES_MAX = 50000,
    WARM_UP_SAMPLES = 5, /* at the head of each round, dropped: the emulator has just been idle */
    TIMEOUT_S = 20,
};

struct message {
    size_t length;
    uint8_t bytes[MESSAGE_BYTES_MAX];
};

struct command_list {
    unsigned count;
    struct message commands[COMMANDS_MAX];
};

struct operation {
    unsigned rounds;
    unsigned samples_per_round;
    unsigned list_count;
    struct command_list lists[LISTS_MAX];
};

struct subject {
    const char *name;
    int data_fd;
    unsigned turn; /* counts samples: which list is the next one's */
    uint64_t *samples_ns;
};

__attribute__((noreturn, format(printf, 2, 3))) static void fail(const char *name,
                                                                 const char *format, ...)
{
    va_list arguments;

    fprintf(stderr, "client: %s: ", name);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint32_t get32(const uint8_t *bytes)
{
    return (uint32_t)bytes[0] << 24 | (uint32_t)bytes[1] << 16 | (uint32_t)bytes[2] << 8 | bytes[3];
}

static void send_message(const char *name, int fd, const struct message *message)
{
    ssize_t count = write(fd, message->bytes, message->length);

    if (count != (ssize_t)message->length)
        fail(name, "write: %s", count < 0 ? strerror(errno) : "short");
}

static size_t receive(const char *name, int fd, uint8_t *bytes, size_t bytes_max)
{
    ssize_t count = read(fd, bytes, bytes_max);

    if (count <= 0)
        fail(name, "read: %s", count < 0 ? strerror(errno) : "it closed the data socket");
    return (size_t)count;
}

/* Leave the response in @response, after checking that it is whole and that the TPM succeeded. */
static void exchange(const struct subject *subject, const struct message *command,
                     struct message *response)
{
    uint32_t size = HEADER_BYTES, code;

    send_message(subject->name, subject->data_fd, command);
    for (response->length = 0; response->length < size;) {
        response->length +=
            receive(subject->name, subject->data_fd, response->bytes + response->length,
                    MESSAGE_BYTES_MAX - response->length);
        if (response->length >= HEADER_BYTES)
            size = get32(response->bytes + 2);
        if (size < HEADER_BYTES || size > MESSAGE_BYTES_MAX)
            fail(subject->name, "a response says that it has %" PRIu32 " bytes", size);
    }
    code = get32(response->bytes + 6);
    if (response->length != size || code != 0)
        fail(subject->name, "a response of %zu bytes says size %" PRIu32 ", code 0x%" PRIx32,
             response->length, size, code);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static uint64_t sample_ns(struct subject *subject, const struct operation *operation)
{
    static struct message response;
    const struct command_list *list = &operation->lists[subject->turn++ % operation->list_count];
    uint64_t start_ns = now_ns();

    for (unsigned number = 0; number < list->count; number++)
        exchange(subject, &list->commands[number], &response);
    return now_ns() - start_ns;
}

static void run_round(struct subject *subject, const struct operation *operation, unsigned round)
{
    uint64_t *samples_ns = subject->samples_ns + round * operation->samples_per_round;

    for (unsigned number = 0; number < WARM_UP_SAMPLES; number++)
        sample_ns(subject, operation);
    for (unsigned number = 0; number < operation->samples_per_round; number++)
        samples_ns[number] = sample_ns(subject, operation);
}

static void stay_on_core(const char *name, unsigned core)
{
    cpu_set_t cores;

    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    if (sched_setaffinity(0, sizeof(cores), &cores) < 0)
        fail(name, "sched_setaffinity to core %u: %s", core, strerror(errno));
}

static void prepare(struct subject *subject, const struct operation *operation)
{
    const struct timeval timeout = {.tv_sec = TIMEOUT_S};

    if (setsockopt(subject->data_fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) < 0)
        fail(subject->name, "setsockopt: %s", strerror(errno));
    subject->samples_ns =
        calloc((size_t)operation->rounds * operation->samples_per_round, sizeof(uint64_t));
    if (subject->samples_ns == NULL)
        fail(subject->name, "no memory for the samples");
}

/* Start the floor: a process that answers whatever it reads with the response that a TPM gave. */
static pid_t start_echo(struct subject *echo, const struct message *response, unsigned core)
{
    static uint8_t command[MESSAGE_BYTES_MAX];
    int ends[2];
    pid_t child;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
        fail(echo->name, "socketpair: %s", strerror(errno));
    child = fork();
    if (child < 0)
        fail(echo->name, "fork: %s", strerror(errno));
    if (child == 0) {
        close(ends[0]);
        stay_on_core(echo->name, core);
        while (read(ends[1], command, sizeof(command)) > 0)
            send_message(echo->name, ends[1], response);
        _exit(0);
    }
    close(ends[1]);
    echo->data_fd = ends[0];
    return child;
}

static void stop_echo(const struct subject *echo, pid_t child)
{
    int status;

    close(echo->data_fd);
    if (waitpid(child, &status, 0) != child || status != 0)
        fail(echo->name, "it did not end as it should");
}

static void print_samples(const struct subject *subject, const struct operation *operation)
{
    const uint64_t *sample = subject->samples_ns;

    printf("{\"subject\": \"%s\", \"rounds_ns\": [", subject->name);
    for (unsigned round = 0; round < operation->rounds; round++) {
        fputs(round == 0 ? "[" : ", [", stdout);
        for (unsigned number = 0; number < operation->samples_per_round; number++)
            printf("%s%" PRIu64, number == 0 ? "" : ", ", *sample++);
        fputc(']', stdout);
    }
    puts("]}");
}

/*
 * Let the emulators and, behind them in @subjects, the echo process take turns. The first turn goes
 * round among the emulators: with two of them, each follows the other as often as the echo process,
 * which leaves other things in the caches.
 */
static void measure(struct subject *subjects, unsigned count, const struct operation *operation,
                    unsigned echo_core)
{
    static struct message response;
    struct subject *echo = &subjects[count - 1];
    pid_t child;

    exchange(&subjects[0], &operation->lists[0].commands[0], &response);
    child = start_echo(echo, &response, echo_core);
    for (unsigned number = 0; number < count; number++)
        prepare(&subjects[number], operation);
    for (unsigned round = 0; round < operation->rounds; round++) {
        for (unsigned turn = 0; turn < count - 1; turn++)
            run_round(&subjects[(round + turn) % (count - 1)], operation, round);
        run_round(echo, operation, round);
    }
    stop_echo(echo, child);
    for (unsigned number = 0; number < count; number++)
        print_samples(&subjects[number], operation);
}

__attribute__((noreturn)) static void refuse(const char *what, const char *argument)
{
    fprintf(stderr,
            "client: %s: %s\n"
            "usage: client ROUNDS SAMPLES CLIENT_CORE ECHO_CORE COMMANDS NAME=DESCRIPTOR...\n",
            what, argument == NULL ? "missing" : argument);
    exit(2);
}

static unsigned parse_number(const char *what, const char *text, unsigned long max)
{
    char *end;
    unsigned long number;

    if (text == NULL || *text == '\0')
        refuse(what, text);
    number = strtoul(text, &end, 10);
    if (*end != '\0' || number > max)
        refuse(what, text);
    return (unsigned)number;
}

static void parse_command(struct message *command, const char *hex)
{
    for (command->length = 0; *hex != '\0'; hex += 2) {
        char digits[3] = {hex[0], hex[1]};

        if (command->length == sizeof(command->bytes))
            refuse("a command is too long", hex);
        if (!isxdigit((unsigned char)digits[0]) || !isxdigit((unsigned char)digits[1]))
            refuse("a command is not hexadecimal", hex);
        command->bytes[command->length++] = (uint8_t)strtoul(digits, NULL, 16);
    }
}

static void parse_list(struct command_list *list, char *text)
{
    char *hex;

    while ((hex = strsep(&text, ",")) != NULL) {
        if (list->count == COMMANDS_MAX)
            refuse("there are too many commands, from", hex);
        parse_command(&list->commands[list->count++], hex);
    }
}

static void parse_lists(struct operation *operation, char *text)
{
    char *list;

    while ((list = strsep(&text, "/")) != NULL) {
        if (operation->list_count == LISTS_MAX)
            refuse("there are too many lists of commands, from", list);
        parse_list(&operation->lists[operation->list_count++], list);
    }
}

int main(int argc, char **argv)
{
    static struct operation operation;
    struct subject subjects[SUBJECTS_MAX + 1] = {0};
    unsigned count = 0, echo_core;

    if (argc < 7)
        refuse("an argument", NULL);
    operation.rounds = parse_number("ROUNDS", argv[1], ROUNDS_MAX);
    operation.samples_per_round = parse_number("SAMPLES", argv[2], SAMPLES_MAX);
    stay_on_core("client", parse_number("CLIENT_CORE", argv[3], CPU_SETSIZE - 1));
    echo_core = parse_number("ECHO_CORE", argv[4], CPU_SETSIZE - 1);
    parse_lists(&operation, argv[5]);
    for (char **argument = argv + 6; *argument != NULL; argument++) {
        if (count == SUBJECTS_MAX)
            refuse("there are too many emulators, from", *argument);
        subjects[count].name = strsep(argument, "=");
        subjects[count++].data_fd = (int)parse_number("DESCRIPTOR", *argument, INT32_MAX);
    }
    subjects[count++].name = "echo";
    measure(subjects, count, &operation, echo_core);
    return fclose(stdout) == 0 ? 0 : 1;
}
