/* The floor of a hand-over: an emulator without a TPM, that answers QEMU on the same kinds of
 * sockets, with the same messages of the same sizes, and whose lane is sealed the same way.
 *
 *   floor CONTROL TAIL_BYTES [PORT]
 *
 * It serves the control channel on the UNIX socket CONTROL. It says on which port of the loopback
 * it waits for the destination of the next hand-over, to which it then gives a tail of TAIL_BYTES;
 * given the PORT of another one, it is that one's destination. Each of the guest's commands is
 * answered with success, and nothing else.
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "bytes.h"
#include "engine/lane.h"

enum { /* of the control channel (docs/control-channel.md) */
       GET_CAPABILITY = 1,
       INIT = 2,
       GET_TPMESTABLISHED = 4,
       GET_STATEBLOB = 12,
       SET_STATEBLOB = 13,
       SET_DATAFD = 16,
       SET_BUFFERSIZE = 17,
       PERMANENT = 1,
       ALL_CAPABILITIES = 0x1ffff,
       BUFFER_BYTES = 4096,
       BLOB_BYTES_MAX = 1 << 19,
};

enum { CONTROL_LISTENER, CONTROL, DATA, LANE_LISTENER, LANE_OUT, LANE_IN, N_DESCRIPTORS };

static struct pollfd fds[N_DESCRIPTORS];
static struct lane *lanes[N_DESCRIPTORS]; /* of LANE_OUT, as source, and LANE_IN */
static bool takes;                        /* a tail has come, and no GRANT yet */
static uint32_t tail_bytes;
static uint8_t buffer[16 + BLOB_BYTES_MAX];

static void send_all(int fd, const void *bytes, size_t n_bytes)
{
    for (size_t sent = 0; sent < n_bytes;) {
        ssize_t n = send(fd, (const char *)bytes + sent, n_bytes - sent, MSG_NOSIGNAL);
        if (n < 0)
            err(1, "send");
        sent += (size_t)n;
    }
}

/* Returns false if the other side has closed. */
static bool receive_exactly(int fd, void *bytes, size_t n_bytes)
{
    for (size_t received = 0; received < n_bytes;) {
        ssize_t n = recv(fd, (char *)bytes + received, n_bytes - received, 0);
        if (n <= 0)
            return false;
        received += (size_t)n;
    }
    return true;
}

static void say(int which, enum lane_kind kind)
{
    struct lane_frame frame = {.kind = kind};
    uint8_t bytes[LANE_FRAME_BYTES];

    if (lane_seal(lanes[which], &frame, bytes) != 0)
        errx(1, "cannot seal");
    send_all(fds[which].fd, bytes, sizeof(bytes));
}

static void hear(int which, enum lane_kind kind)
{
    struct lane_frame frame;
    uint8_t bytes[LANE_FRAME_BYTES];

    if (!receive_exactly(fds[which].fd, bytes, sizeof(bytes)) ||
        lane_open(lanes[which], bytes, &frame) != 0 || frame.kind != kind)
        errx(1, "the other side did not say %d", kind);
}

/* Both sides greet each other, long before the guest stands still. */
static void open_lane(int which, int fd)
{
    static const struct lane_keying keying;
    int one = 1;

    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) < 0)
        err(1, "TCP_NODELAY");
    if (lane_new(&lanes[which], &keying, which == LANE_OUT) != 0)
        errx(1, "no memory");
    fds[which].fd = fd;
    say(which, LANE_HELLO);
    hear(which, LANE_HELLO);
}

static void close_lane(int which)
{
    close_descriptor(&fds[which].fd);
    lane_free(lanes[which]);
    lanes[which] = NULL;
}

static void answer(size_t n_bytes)
{
    send_all(fds[CONTROL].fd, buffer, n_bytes);
}

static void answer_state_blob(void)
{
    uint32_t n_bytes = get_be32(buffer + 8) == PERMANENT ? tail_bytes : 0;

    put_be32(buffer, 0);
    put_be32(buffer + 4, 0);
    put_be32(buffer + 8, n_bytes);
    put_be32(buffer + 12, n_bytes);
    memset(buffer + 16, 0x5a, n_bytes);
    answer(16 + n_bytes);
}

static void take_state_blob(size_t n_received)
{
    while (n_received < 16 || n_received < 16 + (size_t)get_be32(buffer + 12)) {
        size_t needed = n_received < 16 ? 16 : 16 + (size_t)get_be32(buffer + 12);
        if (needed > sizeof(buffer) ||
            !receive_exactly(fds[CONTROL].fd, buffer + n_received, needed - n_received))
            errx(1, "a state blob was cut");
        n_received = needed;
    }
    say(LANE_IN, LANE_TAKE);
    takes = true;
}

static void answer_zeros(size_t n_bytes)
{
    memset(buffer, 0, n_bytes);
    answer(n_bytes);
}

static void carry_out(size_t n_received, int descriptor)
{
    switch (get_be32(buffer)) {
    case GET_CAPABILITY:
        put_be64(buffer, ALL_CAPABILITIES);
        answer(8);
        return;
    case GET_TPMESTABLISHED:
        answer_zeros(8);
        return;
    case GET_STATEBLOB:
        answer_state_blob();
        return;
    case SET_BUFFERSIZE:
        put_be32(buffer, 0);
        for (int i = 1; i < 4; i++)
            put_be32(buffer + 4 * i, BUFFER_BYTES);
        answer(16);
        return;
    case SET_DATAFD:
        close_descriptor(&fds[DATA].fd);
        fds[DATA].fd = descriptor;
        break;
    case SET_STATEBLOB:
        take_state_blob(n_received);
        break;
    case INIT:
        if (takes)
            hear(LANE_IN, LANE_GRANT);
        takes = false;
        break;
    }
    answer_zeros(4);
}

static void serve_control(void)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec vector = {buffer, sizeof(buffer)};
    struct msghdr message = {
        .msg_iov = &vector,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    int descriptor = -1;

    ssize_t n = recvmsg(fds[CONTROL].fd, &message, MSG_CMSG_CLOEXEC);
    if (n < 4) {
        close_descriptor(&fds[CONTROL].fd);
        return;
    }
    struct cmsghdr *first = CMSG_FIRSTHDR(&message);
    if (first && first->cmsg_type == SCM_RIGHTS)
        memcpy(&descriptor, CMSG_DATA(first), sizeof(int));
    carry_out((size_t)n, descriptor);
}

static void serve_data(void)
{
    static const uint8_t success[] = {0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0};
    uint8_t command[BUFFER_BYTES];

    if (recv(fds[DATA].fd, command, sizeof(command), 0) <= 0)
        close_descriptor(&fds[DATA].fd);
    else
        send_all(fds[DATA].fd, success, sizeof(success));
}

static void serve_lane(void)
{
    char byte;

    if (recv(fds[LANE_OUT].fd, &byte, 1, MSG_PEEK) <= 0) {
        close_lane(LANE_OUT);
        return;
    }
    hear(LANE_OUT, LANE_TAKE);
    say(LANE_OUT, LANE_GRANT);
}

static void serve(int which)
{
    switch (which) {
    case CONTROL_LISTENER:
        close_descriptor(&fds[CONTROL].fd);
        fds[CONTROL].fd = accept(fds[which].fd, NULL, NULL);
        break;
    case CONTROL:
        serve_control();
        break;
    case DATA:
        serve_data();
        break;
    case LANE_LISTENER:
        open_lane(LANE_OUT, accept(fds[which].fd, NULL, NULL));
        break;
    case LANE_OUT:
        serve_lane();
        break;
    case LANE_IN: /* the source has ended; what it says is heard by INIT */
        if (!takes)
            close_lane(LANE_IN);
        break;
    }
}

static struct sockaddr_in loopback(uint16_t port)
{
    return (struct sockaddr_in){
        .sin_family = AF_INET,
        .sin_port = htons(port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
}

static void listen_for_lanes(void)
{
    struct sockaddr_in address = loopback(0);
    socklen_t n_address = sizeof(address);
    int fd = fds[LANE_LISTENER].fd = socket(AF_INET, SOCK_STREAM, 0);

    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 1) < 0 ||
        getsockname(fd, (struct sockaddr *)&address, &n_address) < 0)
        err(1, "cannot listen for a lane");
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
}

static void connect_lane(uint16_t port)
{
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
        err(1, "cannot connect to port %d", port);
    open_lane(LANE_IN, fd);
}

static void listen_for_control(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = fds[CONTROL_LISTENER].fd = socket(AF_UNIX, SOCK_STREAM, 0);

    if (strlen(path) >= sizeof(address.sun_path))
        errx(2, "%s is too long", path);
    strcpy(address.sun_path, path);
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 1) < 0)
        err(1, "cannot listen on %s", path);
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc > 4)
        errx(2, "usage: floor CONTROL TAIL_BYTES [PORT]");
    tail_bytes = (uint32_t)strtoul(argv[2], NULL, 10);
    if (tail_bytes < 1 || tail_bytes > BLOB_BYTES_MAX)
        errx(2, "a tail has 1 to %d bytes", BLOB_BYTES_MAX);
    for (int i = 0; i < N_DESCRIPTORS; i++)
        fds[i] = (struct pollfd){.fd = -1, .events = POLLIN};
    listen_for_lanes();
    if (argc == 4)
        connect_lane((uint16_t)strtoul(argv[3], NULL, 10));
    listen_for_control(argv[1]);
    for (;;) {
        if (poll(fds, N_DESCRIPTORS, -1) < 0)
            err(1, "poll");
        for (int i = 0; i < N_DESCRIPTORS; i++)
            if (fds[i].fd >= 0 && fds[i].revents)
                serve(i);
    }
}
