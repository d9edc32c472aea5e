/* An engine of a later version of the link than its vtpmd.
 *
 * In place of sendmsg(), by which it greets.
 */
#include <sys/socket.h>

#include "engine/link_types.h"

ssize_t __real_sendmsg(int fd, const struct msghdr *header, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags);

ssize_t __wrap_sendmsg(int fd, const struct msghdr *header, int flags)
{
    struct link_header *says = header->msg_iov[0].iov_base;

    if (header->msg_iov[0].iov_len == sizeof(*says) && says->operation == LINK_READY)
        says->argument = LINK_VERSION + 1;
    return __real_sendmsg(fd, header, flags);
}
