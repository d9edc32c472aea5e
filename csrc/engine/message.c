#include "message.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "bytes.h"
#include "clock.h"
#include "vectors.h"

void message_deinit(struct message *message)
{
    if (message->payload)
        explicit_bzero(message->payload, message->header.payload_bytes);
    free(message->payload);
    close_descriptor(&message->descriptor);
}

/* Where messages come from. */
struct source {
    ssize_t (*read)(struct source *from, void *bytes, size_t n_bytes, int *descriptor);
    int fd;
    int64_t deadline_ms; /* for a whole message, where there may be less */
    off_t at;            /* in a record */
};

/* Reads once, and keeps the first descriptor that comes along.
 * sandbox: recvmsg */
static ssize_t receive_some(struct source *from, void *bytes, size_t n_bytes, int *descriptor)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec vector = {bytes, n_bytes};
    struct msghdr header = {
        .msg_iov = &vector,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };

    ssize_t n = recvmsg(from->fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n < 0)
        return n;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) {
        close_descriptor(descriptor);
        memcpy(descriptor, CMSG_DATA(first), sizeof(int));
    }
    return n;
}

static ssize_t read_some(struct source *from, void *bytes, size_t n_bytes, int *descriptor)
{
    (void)descriptor;
    return read(from->fd, bytes, n_bytes);
}

/* sandbox: pread64 */
static ssize_t read_some_at(struct source *from, void *bytes, size_t n_bytes, int *descriptor)
{
    (void)descriptor;
    ssize_t n = pread(from->fd, bytes, n_bytes, from->at);
    from->at += n > 0 ? n : 0;
    return n;
}

/* Returns 0 or a negative errno: what a socket did not do has to be tried again, or not.
 * sandbox: poll|ppoll restart_syscall=EINTR */
static int wait_for(int fd, short events, int64_t deadline_ms)
{
    struct pollfd entry = {.fd = fd, .events = events};
    int64_t left_ms = deadline_ms - clock_ms();

    if (errno == EINTR)
        return 0;
    if (errno != EAGAIN)
        return -errno;
    int n = left_ms > 0 ? poll(&entry, 1, (int)left_ms) : 0;
    if (n == 0)
        return -ETIMEDOUT;
    return n < 0 && errno != EINTR ? -errno : 0;
}

/* Returns 0, MESSAGE_END before the first byte, or a negative errno. */
static int take_exactly(struct source *from, void *bytes, size_t n_bytes, int *descriptor)
{
    for (size_t taken = 0; taken < n_bytes;) {
        ssize_t n = from->read(from, (char *)bytes + taken, n_bytes - taken, descriptor);
        if (n == 0)
            return taken ? -EPIPE : MESSAGE_END;
        int r = n < 0 ? wait_for(from->fd, POLLIN, from->deadline_ms) : 0;
        if (r < 0)
            return r;
        taken += n < 0 ? 0 : (size_t)n;
    }
    return 0;
}

static int take(struct source *from, struct message *message)
{
    struct link_header *header = &message->header;

    int r = take_exactly(from, header, sizeof(*header), &message->descriptor);
    if (r != 0)
        return r;
    size_t n_bytes = header->payload_bytes;
    header->payload_bytes = 0; /* until it is there */
    if (n_bytes > LINK_PAYLOAD_BYTES_MAX)
        return -EMSGSIZE;
    if (n_bytes == 0)
        return 0;
    message->payload = malloc(n_bytes);
    if (!message->payload)
        return -ENOMEM;
    header->payload_bytes = (uint32_t)n_bytes;
    r = take_exactly(from, message->payload, n_bytes, &message->descriptor);
    return r == MESSAGE_END ? -EPIPE : r;
}

int message_receive(int fd, struct message *message, int64_t deadline_ms)
{
    struct source from = {.read = receive_some, .fd = fd, .deadline_ms = deadline_ms};

    return take(&from, message);
}

int message_read(int fd, struct message *message)
{
    struct source from = {.read = read_some, .fd = fd};

    return take(&from, message);
}

int message_read_at(int fd, off_t *at, struct message *message)
{
    struct source from = {.read = read_some_at, .fd = fd, .at = *at};

    int r = take(&from, message);
    *at = from.at;
    return r;
}

/* sandbox: sendmsg */
int message_send(int fd, const struct message *message, int64_t deadline_ms)
{
    struct iovec vectors[2] = {
        {(void *)&message->header, sizeof(message->header)},
        {message->payload, message->header.payload_bytes},
    };
    struct msghdr header = {.msg_iov = vectors, .msg_iovlen = 2};

    while (header.msg_iovlen > 0) {
        ssize_t n = sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
        int r = n < 0 ? wait_for(fd, POLLOUT, deadline_ms) : 0;
        if (r < 0)
            return r;
        vectors_advance(&header.msg_iov, &header.msg_iovlen, n < 0 ? 0 : (size_t)n);
    }
    return 0;
}
