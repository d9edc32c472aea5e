#include "data.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "blackout.h"
#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "error.h"
#include "link.h"
#include "thread.h"
#include "tpm.h"
#include "vectors.h"
#include "version.h"

enum {
    ACCEPT_RETRY_MS = 1000,       /* where descriptors have run out */
    THREAD_STACK_BYTES = 1 << 20, /* libtpms keeps a copy of its NV memory on the stack */
    NO_SOCKET = -1,
    PREFIX_SEND_COMMAND = 8, /* TPM_SEND_COMMAND of the simulator's protocol */
    PREFIX_AT_LOCALITY = 4,
    PREFIX_AT_SIZE = 5,
};

struct data_channel {
    struct tpm *tpm;
    struct blackout *blackout;
    size_t command_bytes_max;
    uint8_t *command;     /* room for the longest, and a prefix */
    int ended_fd;         /* to be readable once a connection has ended; or NO_SOCKET */
    int listening_fd;     /* or NO_SOCKET; set before anything is served */
    bool disconnects;     /* a connection is for one command */
    bool is_the_only_one; /* no other socket is to be served */
    pthread_t thread;
    pthread_mutex_t lock; /* over what follows */
    pthread_cond_t changed;
    int fd;   /* being served */
    int next; /* to be served then */
    bool has_begun, ending;
};

/* A command by itself begins with its tag, of which none is 0. */
static bool begins_with_prefix(const uint8_t *bytes)
{
    return get_be32(bytes) == PREFIX_SEND_COMMAND;
}

int data_parse(const uint8_t *bytes, size_t n_bytes, size_t command_bytes_max, bool may_be_prefixed,
               struct data_command *command)
{
    *command = (struct data_command){0};
    if (n_bytes < TPM_AT_CODE) /* behind the size */
        return DATA_NEED_MORE;
    if (may_be_prefixed && begins_with_prefix(bytes)) {
        command->has_prefix = true;
        command->start = DATA_PREFIX_BYTES;
        command->locality = bytes[PREFIX_AT_LOCALITY];
    }
    if (n_bytes < command->start + TPM_AT_CODE)
        return DATA_NEED_MORE;
    uint32_t size = get_be32(bytes + command->start + TPM_AT_SIZE);
    if (size < TPM_HEADER_BYTES || size > command_bytes_max ||
        command->locality > DATA_LOCALITY_MAX ||
        (command->has_prefix && get_be32(bytes + PREFIX_AT_SIZE) != size))
        return DATA_MALFORMED;
    if (n_bytes < command->start + size)
        return DATA_NEED_MORE;
    command->n_bytes = size;
    return DATA_COMMAND;
}

/* A process that was stopped and goes on restarts what waited for a time; or that is interrupted.
 * sandbox: poll|ppoll restart_syscall=EINTR */
static bool wait_readable(int fd, int64_t deadline_ms)
{
    struct pollfd entry = {.fd = fd, .events = POLLIN};

    for (;;) {
        int64_t left_ms = deadline_ms - clock_ms();
        int n = left_ms > 0 ? poll(&entry, 1, (int)left_ms) : 0;
        if (n >= 0 || errno != EINTR)
            return n > 0;
    }
}

/* Not recv(), which is another system call.
 * sandbox: recvmsg */
static ssize_t receive(int fd, uint8_t *bytes, size_t n_bytes, int flags)
{
    struct iovec vector = {bytes, n_bytes};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
    ssize_t n;

    do
        n = recvmsg(fd, &header, flags);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

/* The socket is as its owner made it: without blocking, or with a time limit. Nobody limits how
 * long a guest may be silent.
 * sandbox: poll|ppoll */
static ssize_t receive_patiently(int fd, uint8_t *bytes, size_t n_bytes)
{
    struct pollfd entry = {.fd = fd, .events = POLLIN};

    for (;;) {
        ssize_t n = receive(fd, bytes, n_bytes, 0);
        if (n != -EAGAIN)
            return n;
        if (poll(&entry, 1, -1) < 0 && errno != EINTR)
            return -errno;
    }
}

static bool is_ending(struct data_channel *channel)
{
    pthread_mutex_lock(&channel->lock);
    bool ending = channel->ending;
    pthread_mutex_unlock(&channel->lock);
    return ending;
}

/* Who does not read is waited for, but not at the end.
 * sandbox: poll|ppoll */
static int wait_writable(struct data_channel *channel, int fd)
{
    struct pollfd entry = {.fd = fd, .events = POLLOUT};

    for (;;) {
        int n = poll(&entry, 1, DATA_ANSWER_TIMEOUT_MS);
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0 && is_ending(channel))
            return -ETIMEDOUT;
    }
}

/* sandbox: sendmsg */
static int send_all(struct data_channel *channel, int fd, struct msghdr *header)
{
    while (header->msg_iovlen > 0) {
        ssize_t n = sendmsg(fd, header, MSG_NOSIGNAL | MSG_DONTWAIT);
        int r = n < 0 && errno != EINTR ? -errno : 0;
        if (r == -EAGAIN)
            r = wait_writable(channel, fd);
        if (r < 0)
            return r;
        if (n > 0)
            vectors_advance(&header->msg_iov, &header->msg_iovlen, (size_t)n);
    }
    return 0;
}

enum {
    READ_HANG_UP = 3, /* beside enum data_verdict */
};

/* Read until there is a command or never will be one. Returns an enum data_verdict (not
 * DATA_NEED_MORE), or READ_HANG_UP. */
static int read_command(struct data_channel *channel, int fd, size_t *n_bytes,
                        struct data_command *command)
{
    uint8_t *buffer = channel->command;
    size_t bytes_max = channel->command_bytes_max + DATA_PREFIX_BYTES;
    int64_t deadline_ms = 0;

    for (*n_bytes = 0;;) {
        ssize_t n = receive_patiently(fd, buffer + *n_bytes, bytes_max - *n_bytes);
        if (n <= 0)
            return READ_HANG_UP;
        *n_bytes += (size_t)n;
        int verdict = data_parse(buffer, *n_bytes, channel->command_bytes_max,
                                 channel->is_the_only_one && version_now()->takes_prefix, command);
        if (verdict != DATA_NEED_MORE)
            return verdict;
        if (deadline_ms == 0)
            deadline_ms = clock_ms() + DATA_REST_TIMEOUT_MS;
        if (!wait_readable(fd, deadline_ms))
            return DATA_MALFORMED;
    }
}

/* What is left of a malformed command must not be taken as the next one. */
static void drop_pending(struct data_channel *channel, int fd)
{
    enum { READS_MAX = 64 }; /* of 4 KiB at least: more than a socket buffer holds */

    for (int i = 0; i < READS_MAX; i++)
        if (receive(fd, channel->command, channel->command_bytes_max, MSG_DONTWAIT) <= 0)
            break;
}

static void execute(struct data_channel *channel, const struct data_command *command,
                    struct tpm_response *response)
{
    if (command->has_prefix)
        tpm_set_locality(channel->tpm, command->locality);
    tpm_execute(channel->tpm, channel->command + command->start, command->n_bytes, response);
}

/* In one piece: TCP would wait in between for the other side to say that it has the first. */
static int send_response(struct data_channel *channel, int fd, bool has_prefix,
                         const struct tpm_response *response)
{
    uint8_t size[sizeof(uint32_t)], success[sizeof(uint32_t)] = {0};
    struct iovec vectors[] = {
        {size, sizeof(size)},
        {response->bytes, response->n_bytes},
        {success, sizeof(success)},
    };
    struct msghdr header = {.msg_iov = vectors, .msg_iovlen = 3};

    put_be32(size, (uint32_t)response->n_bytes);
    if (!has_prefix) {
        header.msg_iov++;
        header.msg_iovlen = 1;
    }
    return send_all(channel, fd, &header);
}

/* Answer one command. Returns 0, READ_HANG_UP or a negative errno. */
static int serve_command(struct data_channel *channel, int fd, struct tpm_response *response)
{
    struct data_command command;
    size_t n_bytes;

    int verdict = read_command(channel, fd, &n_bytes, &command);
    if (verdict == READ_HANG_UP)
        return READ_HANG_UP;
    if (verdict == DATA_COMMAND) {
        execute(channel, &command, response);
    } else {
        drop_pending(channel, fd);
        tpm_respond_error(response, version_now()->command_size);
    }
    int r = send_response(channel, fd, command.has_prefix, response);
    blackout_worked(channel->blackout);
    explicit_bzero(channel->command, n_bytes);
    tpm_response_wipe(response);
    return r;
}

/* Answer commands until the other end hangs up. */
static void serve_socket(struct data_channel *channel, int fd)
{
    struct tpm_response response;
    int r;

    tpm_response_init(&response);
    do
        r = serve_command(channel, fd, &response);
    while (r == 0 && !channel->disconnects);
    tpm_response_deinit(&response);
    if (channel->ended_fd != NO_SOCKET)
        link_wake(channel->ended_fd);
}

/* With the lock, which is given up while it waits. A socket that listens is woken up by its end.
 * sandbox: accept4 futex */
static void wait_for_socket(struct data_channel *channel)
{
    if (channel->listening_fd == NO_SOCKET) {
        pthread_cond_wait(&channel->changed, &channel->lock);
        return;
    }
    pthread_mutex_unlock(&channel->lock);
    int fd = accept4(channel->listening_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0 && errno != EINTR && errno != ECONNABORTED)
        wait_readable(NO_SOCKET, clock_ms() + ACCEPT_RETRY_MS);
    pthread_mutex_lock(&channel->lock);
    channel->next = fd;
}

/* sandbox: futex close */
static void *serve(void *argument)
{
    struct data_channel *channel = argument;

    pthread_mutex_lock(&channel->lock);
    while (!channel->has_begun && !channel->ending)
        pthread_cond_wait(&channel->changed, &channel->lock);
    while (!channel->ending) {
        if (channel->next == NO_SOCKET) {
            wait_for_socket(channel);
            continue;
        }
        int fd = channel->fd = channel->next;
        channel->next = NO_SOCKET;
        pthread_mutex_unlock(&channel->lock);
        serve_socket(channel, fd);
        pthread_mutex_lock(&channel->lock);
        close_descriptor(&channel->fd);
    }
    pthread_mutex_unlock(&channel->lock);
    return NULL;
}

int data_channel_new(struct data_channel **out, struct tpm *tpm, struct blackout *blackout)
{
    struct data_channel *channel = calloc(1, sizeof(*channel));

    if (!channel)
        return -ENOMEM;
    channel->tpm = tpm;
    channel->blackout = blackout;
    channel->command_bytes_max = tpm_message_bytes_max();
    channel->command = malloc(DATA_PREFIX_BYTES + channel->command_bytes_max);
    if (!channel->command) {
        free(channel);
        return -ENOMEM;
    }
    channel->fd = channel->next = channel->listening_fd = channel->ended_fd = NO_SOCKET;
    check(pthread_mutex_init(&channel->lock, NULL) == 0);
    check(pthread_cond_init(&channel->changed, NULL) == 0);
    int r = thread_start(&channel->thread, THREAD_STACK_BYTES, serve, channel);
    if (r < 0) {
        free(channel->command);
        free(channel);
        return r;
    }
    *out = channel;
    return 0;
}

/* sandbox: futex */
void data_channel_begin(struct data_channel *channel)
{
    pthread_mutex_lock(&channel->lock);
    channel->has_begun = true;
    pthread_cond_signal(&channel->changed);
    pthread_mutex_unlock(&channel->lock);
}

/* sandbox: poll|ppoll */
static bool has_hung_up(int fd)
{
    struct pollfd entry = {.fd = fd, .events = POLLRDHUP};

    return poll(&entry, 1, 0) > 0 && entry.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* sandbox: futex */
int data_channel_set_socket(struct data_channel *channel, int fd)
{
    int r = 0;

    pthread_mutex_lock(&channel->lock);
    int newest = channel->next != NO_SOCKET ? channel->next : channel->fd;
    if (channel->is_the_only_one || (newest != NO_SOCKET && !has_hung_up(newest))) {
        r = DATA_SOCKET_BUSY;
    } else {
        close_descriptor(&channel->next);
        channel->next = fd;
        pthread_cond_signal(&channel->changed);
    }
    pthread_mutex_unlock(&channel->lock);
    return r;
}

/* sandbox: futex */
void data_channel_serve(struct data_channel *channel, int fd, unsigned flags)
{
    pthread_mutex_lock(&channel->lock);
    channel->is_the_only_one = true;
    channel->disconnects = flags & LINK_DATA_DISCONNECTS;
    if (flags & LINK_DATA_CONNECTED)
        channel->next = fd;
    else
        channel->listening_fd = fd;
    pthread_cond_signal(&channel->changed);
    pthread_mutex_unlock(&channel->lock);
}

void data_channel_end_with(struct data_channel *channel, int fd)
{
    channel->ended_fd = fd;
}

/* sandbox: shutdown futex */
void data_channel_free(struct data_channel *channel)
{
    pthread_mutex_lock(&channel->lock);
    channel->ending = true;
    if (channel->listening_fd != NO_SOCKET)
        shutdown(channel->listening_fd, SHUT_RD);
    /* Wakes the thread from its read; a command that runs is answered first. */
    if (channel->fd != NO_SOCKET)
        shutdown(channel->fd, SHUT_RD);
    pthread_cond_signal(&channel->changed);
    pthread_mutex_unlock(&channel->lock);
    pthread_join(channel->thread, NULL);
    close_descriptor(&channel->next);
    close_descriptor(&channel->listening_fd);
    pthread_cond_destroy(&channel->changed);
    pthread_mutex_destroy(&channel->lock);
    free(channel->command);
    free(channel);
}
