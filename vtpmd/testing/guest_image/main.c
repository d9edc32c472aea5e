/*
 * The guest's workload: uses the TPM as a host orders it over a serial line.
 *
 *   workload DEVICE      commands on standard input, one a line; answers on standard output
 *
 *   setup                create everything; once, in a TPM where it does not exist
 *   work COUNT [KIND]    do so many operations of a kind: mixed (the default), rsa-2048, rsa-3072,
 *                        tpm-1.2
 *   start [KIND]         operate in the background until `stop`, `work` or `check`
 *   stop                 say what the background did
 *   check NONCE          check everything; sign the nonce
 *   check12              check what the operations of kind tpm-1.2 have done
 *   raw DIGITS           execute a command, and say what the response is
 *   read                 say what the TPM holds, without checking
 *   measure TEXT         extend a PCR that outlives sleep
 *   power                say what that holds, the count of the TPM's starts, and of its failures
 *   touch                use what is protected from dictionary attacks
 *   shutdown             say TPM2_Shutdown(STATE), as a kernel that drives the TPM does by itself
 *   sleep                suspend to RAM; answered when the guest has woken up
 *
 * An answer is lines `fact NAME VALUE`, then `ok` or `fail REASON`. What fails in the background
 * is said in the answer to the next command. A failure stays: after it every command fails.
 */
#include "device.h"
#include "failure.h"
#include "power.h"
#include "tpm.h"
#include "tpm12.h"
#include "workload.h"

#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#define LINE_BYTES_MAX (16 + 2 * MESSAGE_BYTES_MAX)

static bool background;
static enum load_kind background_kind;
static uint64_t background_operations;

static int parse_kind(const char *name, enum load_kind *kind)
{
    static const char *const names[] = {[LOAD_MIXED] = "mixed",
                                        [LOAD_RSA_2048] = "rsa-2048",
                                        [LOAD_RSA_3072] = "rsa-3072",
                                        [LOAD_TPM_1_2] = "tpm-1.2"};

    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (name == NULL || strcmp(name, names[i]) == 0) {
            *kind = (enum load_kind)i;
            return 0;
        }
    }
    return failure("no such kind of load: %s", name);
}

static int work(const char *count, const char *kind_name)
{
    uint64_t operations = count ? strtoull(count, NULL, 10) : 0;
    enum load_kind kind = LOAD_MIXED;

    if (parse_kind(kind_name, &kind) < 0)
        return -1;
    tpm_take_latency();
    for (uint64_t done = 0; done < operations; done++) {
        if (workload_step(kind) < 0)
            return -1;
    }
    workload_report(operations);
    return 0;
}

static int start(const char *kind_name)
{
    if (parse_kind(kind_name, &background_kind) < 0)
        return -1;
    background_operations = 0;
    background = true;
    tpm_take_latency();
    return 0;
}

static int stop(void)
{
    workload_report(background_operations);
    return 0;
}

static int execute(const char *command, const char *first, const char *second)
{
    background = false;
    if (failure_text() != NULL)
        return -1;
    if (strcmp(command, "setup") == 0)
        return workload_setup();
    if (strcmp(command, "work") == 0)
        return work(first, second);
    if (strcmp(command, "start") == 0)
        return start(first);
    if (strcmp(command, "stop") == 0)
        return stop();
    if (strcmp(command, "check") == 0 && first != NULL)
        return workload_check((struct span){first, strlen(first)});
    if (strcmp(command, "check12") == 0)
        return tpm12_check();
    if (strcmp(command, "raw") == 0 && first != NULL)
        return tpm12_raw(first);
    if (strcmp(command, "read") == 0)
        return workload_read();
    if (strcmp(command, "measure") == 0 && first != NULL)
        return power_measure(first);
    if (strcmp(command, "power") == 0)
        return power_read();
    if (strcmp(command, "touch") == 0)
        return power_touch();
    if (strcmp(command, "shutdown") == 0)
        return power_shutdown();
    if (strcmp(command, "sleep") == 0)
        return power_sleep();
    return failure("no such command: %s", command);
}

static void answer(char *line)
{
    char *state, *command = strtok_r(line, " ", &state);
    char *first = strtok_r(NULL, " ", &state), *second = strtok_r(NULL, " ", &state);

    if (command == NULL)
        return;
    if (execute(command, first, second) < 0)
        printf("fail %s\n", failure_text());
    else
        printf("ok\n");
    fflush(stdout);
}

/* Read what is there; answer when it completes a line. Returns false at the end of the input. */
static bool receive(void)
{
    static char line[LINE_BYTES_MAX];
    static size_t size;
    char byte;

    if (read(STDIN_FILENO, &byte, 1) != 1)
        return false;
    if (byte == '\n') {
        line[size] = '\0';
        size = 0;
        answer(line);
    } else if (size < sizeof(line) - 1) {
        line[size++] = byte;
    }
    return true;
}

/* A terminal must neither echo nor translate; a pipe, in tests, is as it should be. */
static void make_raw(int terminal)
{
    struct termios settings;

    if (tcgetattr(terminal, &settings) < 0)
        return;
    cfmakeraw(&settings);
    cfsetspeed(&settings, B115200);
    tcsetattr(terminal, TCSANOW, &settings);
}

int main(int argc, char **argv)
{
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    bool more = true;

    make_raw(STDIN_FILENO);
    if (argc != 2)
        failure("usage: workload DEVICE");
    else
        device_open(argv[1]);
    printf("ready\n");
    fflush(stdout);
    while (more) {
        if (poll(&input, 1, background ? 0 : -1) > 0)
            more = receive();
        else if (background && workload_step(background_kind) < 0)
            background = false;
        else if (background)
            background_operations++;
    }
    return 0;
}
