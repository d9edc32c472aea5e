/* A canary: an engine whose TPM opens a socket, as one that a guest has taken over might.
 *
 * In place of TPMLIB_Process(), which runs each command.
 */
#include <libtpms/tpm_library.h>
#include <sys/socket.h>

TPM_RESULT __real_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size);
TPM_RESULT __wrap_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size);

TPM_RESULT __wrap_TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *allocated,
                                 unsigned char *command, uint32_t command_size)
{
    (void)socket(AF_INET, SOCK_STREAM, 0);
    return __real_TPMLIB_Process(response, size, allocated, command, command_size);
}
