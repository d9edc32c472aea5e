#include "server.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "bytes.h"
#include "check.h"
#include "clock.h"
#include "error.h"
#include "tpm.h"

enum {
    NO_CLIENT = -1,
    FOREVER = -1,
    ACCEPT_RETRY_MS = 1000, /* where descriptors have run out */
};

struct server {
    struct commands commands;
    struct control control;
    int listening_fd;
    int wake_fd;
    int client_fd;
    enum link_control control_is;
    bool ends_with_client;
    bool is_verbose;
    bool has_ended;
    bool accept_failed; /* and a person knows */
    bool next_is_known; /* a person knows that another client waits for this one's end */
    uint8_t buffer[SERVER_READ_BYTES_MAX];
};

int server_new(struct server **out, const struct commands *about, int listening_fd, int wake_fd)
{
    struct server *server = calloc(1, sizeof(*server));

    if (!server)
        return -ENOMEM;
    server->commands = *about;
    server->commands.answer.tail = MESSAGE_NONE;
    server->listening_fd = listening_fd;
    server->wake_fd = wake_fd;
    server->client_fd = NO_CLIENT;
    *out = server;
    return 0;
}

void server_set_control(struct server *server, enum link_control control)
{
    server->control_is = control;
}

void server_end_with_client(struct server *server)
{
    server->ends_with_client = true;
}

void server_free(struct server *server)
{
    if (server)
        explicit_bzero(&server->commands.migration_key, sizeof(server->commands.migration_key));
    free(server);
}

void server_set_verbose(struct server *server, bool is_so)
{
    server->is_verbose = is_so;
}

struct commands *server_commands(struct server *server)
{
    return &server->commands;
}

static void tell_of_next(struct server *server)
{
    error_report("another client has connected to the control socket: it waits until this one has "
                 "gone; a vTPM is for one QEMU");
    server->next_is_known = true;
}

/* The socket that another client may come on while one is served, or NO_CLIENT. */
static int next_fd(const struct server *server)
{
    bool may_come = server->control_is == LINK_CONTROL_LISTENS && server->client_fd >= 0;

    return may_come && !server->next_is_known ? server->listening_fd : NO_CLIENT;
}

/* Wait for one of a socket's events. Returns false at the deadline, and when the server is to end.
 * sandbox: poll|ppoll restart_syscall=EINTR */
static bool wait_for(struct server *server, int fd, short events, int64_t deadline_ms)
{
    struct pollfd entries[] = {{server->wake_fd, POLLIN, 0}, {fd, events, 0}, {.events = POLLIN}};

    for (;;) {
        entries[2].fd = next_fd(server);
        int64_t left_ms = deadline_ms == FOREVER ? FOREVER : deadline_ms - clock_ms();
        if (deadline_ms != FOREVER && left_ms < 0)
            left_ms = 0;
        int n = poll(entries, 3, (int)left_ms);
        if (n < 0 && errno == EINTR)
            continue;
        if (entries[0].revents)
            server->has_ended = true;
        if (n > 0 && entries[2].revents)
            tell_of_next(server);
        if (n > 0 && !server->has_ended && !entries[1].revents)
            continue;
        return n > 0 && !server->has_ended;
    }
}

/* sandbox: accept4 */
static int accept_client(struct server *server)
{
    int fd = accept4(server->listening_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS)) {
        if (!server->accept_failed)
            error_report("cannot take QEMU's connection yet: %s; end what has many files open",
                         strerror(errno));
        server->accept_failed = true;
        wait_for(server, -1, 0, clock_ms() + ACCEPT_RETRY_MS);
    }
    if (fd >= 0)
        server->accept_failed = false;
    return fd;
}

/* Read once, with what descriptors come along: the kernel closes those that have no room.
 * sandbox: recvmsg */
static ssize_t read_some(struct server *server)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(CONTROL_DESCRIPTORS_MAX * sizeof(int))];
    } ancillary;
    struct iovec vector = {server->buffer, sizeof(server->buffer)};
    struct msghdr header = {
        .msg_iov = &vector,
        .msg_iovlen = 1,
        .msg_control = &ancillary,
        .msg_controllen = sizeof(ancillary),
    };
    int descriptors[CONTROL_DESCRIPTORS_MAX];
    size_t n_descriptors = 0;

    ssize_t n = recvmsg(server->client_fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n < 0)
        return -errno;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_level == SOL_SOCKET && first->cmsg_type == SCM_RIGHTS) {
        n_descriptors = (first->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(descriptors, CMSG_DATA(first), n_descriptors * sizeof(int));
    }
    control_receive(&server->control, server->buffer, (size_t)n, descriptors, n_descriptors);
    explicit_bzero(server->buffer, (size_t)n);
    return n;
}

/* Drop what has come in excess of a command, until it is so much that nothing is sent any more. */
static void drain(struct server *server)
{
    struct iovec *vectors;
    ssize_t n;

    do
        n = read_some(server);
    while ((n > 0 || n == -EINTR) && control_output(&server->control, &vectors) > 0);
}

/* sandbox: sendmsg */
static bool send_answer(struct server *server)
{
    int64_t deadline_ms = clock_ms() + SERVER_ANSWER_TIMEOUT_MS;
    struct msghdr header = {0};

    while ((header.msg_iovlen = control_output(&server->control, &header.msg_iov)) > 0) {
        ssize_t n = sendmsg(server->client_fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0)
            control_sent(&server->control, (size_t)n);
        else if (errno == EAGAIN && wait_for(server, server->client_fd, POLLOUT, deadline_ms))
            continue;
        else if (errno != EINTR)
            return false;
    }
    return true;
}

/* An answer, for the log. */
struct answer {
    uint32_t result; /* TPM_RESULT */
    size_t n_bytes;  /* 0: nothing is sent */
    bool is_sent;
};

static struct answer look_at_answer(struct control *control)
{
    struct answer answer = {0};
    struct iovec *vectors;
    size_t n_vectors = control_output(control, &vectors);

    if (n_vectors > 0)
        answer.result = get_be32(vectors->iov_base);
    for (size_t i = 0; i < n_vectors; i++)
        answer.n_bytes += vectors[i].iov_len;
    return answer;
}

static void log_command(const struct control_event *event, struct answer answer, int64_t took_ns)
{
    const char *sent = answer.is_sent ? "" : ", not sent";
    long long took_us = took_ns / NS_PER_US;

    if (event->reason)
        error_report("command %#x refused (%s): result 0x%x, %zu bytes, %lld µs%s", event->number,
                     event->reason, answer.result, answer.n_bytes, took_us, sent);
    else
        error_report("%s: result 0x%x, %zu bytes, %lld µs%s", event->command->name, answer.result,
                     answer.n_bytes, took_us, sent);
}

/* Also while a client never leaves anything to wait for.
 * sandbox: poll|ppoll */
static void note_end(struct server *server)
{
    struct pollfd entry = {.fd = server->wake_fd, .events = POLLIN};

    if (poll(&entry, 1, 0) > 0)
        server->has_ended = true;
}

/* Carry out what has come whole, and send the answer. Returns false if the connection is of no more
 * use. */
static bool serve_command(struct server *server, int verdict, const struct control_event *event)
{
    int64_t began_ns = server->is_verbose ? clock_ns() : 0;

    if (verdict == CONTROL_REQUEST)
        commands_carry_out(&server->commands, &server->control, event);
    drain(server);
    struct answer answer = look_at_answer(&server->control);
    answer.is_sent = answer.n_bytes > 0 && send_answer(server);
    if (server->is_verbose)
        log_command(event, answer, clock_ns() - began_ns);
    if (verdict == CONTROL_REQUEST)
        commands_answered(&server->commands);
    server->has_ended |= server->commands.has_shut_down;
    note_end(server);
    return answer.is_sent;
}

/* Wait for more of a client's bytes, and take them. Returns false if none will come. */
static bool receive_more(struct server *server, int64_t *deadline_ms)
{
    if (!control_is_partial(&server->control))
        *deadline_ms = FOREVER;
    else if (*deadline_ms == FOREVER)
        *deadline_ms = clock_ms() + SERVER_COMMAND_TIMEOUT_MS;
    ssize_t n = read_some(server);
    if (n == -EAGAIN)
        return wait_for(server, server->client_fd, POLLIN, *deadline_ms);
    return n > 0 || n == -EINTR;
}

/* Serve a client until its connection is of no more use. */
static void serve_client(struct server *server)
{
    struct control_event event;
    int64_t deadline_ms = FOREVER;
    bool goes_on = true;

    while (goes_on && !server->has_ended) {
        bool runs = tpm_is_running(server->commands.tpm);
        int verdict =
            control_next(&server->control, runs ? CONTROL_RUNNING : CONTROL_STOPPED, &event);
        if (verdict == CONTROL_NEED_DATA)
            goes_on = receive_more(server, &deadline_ms);
        else
            goes_on = verdict != CONTROL_CLOSED && serve_command(server, verdict, &event);
    }
}

/* Return the next client's socket, or NO_CLIENT if there is none yet. */
static int next_client(struct server *server)
{
    int fd = server->listening_fd;

    if (server->control_is == LINK_CONTROL_LISTENS)
        return wait_for(server, fd, POLLIN, FOREVER) ? accept_client(server) : NO_CLIENT;
    bool is_connected = server->control_is == LINK_CONTROL_CONNECTED;
    server->control_is = LINK_CONTROL_NONE;
    if (!is_connected)
        wait_for(server, NO_CLIENT, 0, FOREVER);
    return is_connected ? fd : NO_CLIENT;
}

/* sandbox: close */
void server_run(struct server *server)
{
    while (!server->has_ended) {
        server->client_fd = next_client(server);
        if (server->client_fd < 0)
            continue;
        server->next_is_known = false;
        control_init(&server->control);
        serve_client(server);
        commands_disconnected(&server->commands);
        control_deinit(&server->control);
        close_descriptor(&server->client_fd);
        server->has_ended |= server->ends_with_client;
    }
}
