/* An engine of before the link had versions: it says none, and knows no LINK_COPY.
 *
 * In place of sendmsg(), by which it greets, and of message_receive(), whose LINK_COPY becomes an
 * operation that is none.
 */
#include <string.h>
#include <sys/socket.h>

#include "engine/link_types.h"
#include "engine/message.h"

enum {
    UNKNOWN = 15,
};

ssize_t __real_sendmsg(int fd, const struct msghdr *header, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags);
int __real_message_receive(int fd, struct message *message, int64_t deadline_ms);
int __wrap_message_receive(int fd, struct message *message, int64_t deadline_ms);

ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags)
{
    struct link_header *says = header->msg_iov[0].iov_base;

    if (header->msg_iov[0].iov_len == sizeof(*says) && says->operation == LINK_READY)
        says->argument = LINK_VERSION_FIRST;
    return __real_sendmsg(fd, header, flags);
}

int __wrap_message_receive(int fd, struct message *message, int64_t deadline_ms)
{
    int r = __real_message_receive(fd, message, deadline_ms);

    if (r == 0 && message->header.operation == LINK_COPY)
        message->header.operation = UNKNOWN;
    return r;
}
