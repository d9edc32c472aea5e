/* A canary: an engine that loses an answer, the first to a TPM2_PCR_Extend of PCR 16.
 *
 * In place of TPMLIB_Process(), which sees the command, and of sendmsg(), by which the
 * answer leaves.
 */
#include <libtpms/tpm_library.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>

enum { CODE_OFFSET = 6 }; /* the code, 4 bytes, and the first handle follow the header's start */

static const unsigned char extends_pcr_16[] = {0, 0, 0x01, 0x82, 0, 0, 0, 16};
static bool was_lost, loses_next;

TPM_RESULT __real_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size);
TPM_RESULT __wrap_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size);
ssize_t __real_sendmsg(int fd, const struct msghdr *message, int flags);
ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags);

TPM_RESULT __wrap_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size)
{
    loses_next = !was_lost && command_size >= CODE_OFFSET + sizeof(extends_pcr_16) &&
                 memcmp(command + CODE_OFFSET, extends_pcr_16, sizeof(extends_pcr_16)) == 0;
    return __real_TPMLIB_Process(response, size, allocated, command, command_size);
}

ssize_t __wrap_sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (!loses_next)
        return __real_sendmsg(fd, message, flags);
    loses_next = false;
    was_lost = true;
    return (ssize_t)message->msg_iov->iov_len; /* the data channel sends one vector */
}
