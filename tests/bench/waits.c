/* How long QEMU waits for its TPM emulator: preloaded into QEMU, it keeps when each command on the
 * control channel was sent, and when the last of its answer was received.
 *
 * QEMU's character devices use sendmsg() and recvmsg(). What goes over a socket whose other end is
 * named .../tpm is written to .../tpm.waits, one line for each piece of an answer; the last line of
 * a command has its end.
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char name[] = "/tpm", suffix[] = ".waits";
static int control = -1, waits = -1;
static bool answered = true;
static uint32_t command;
static long long began_ns;

static long long now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* QEMU opens one such connection, and keeps it. */
static bool is_control(int fd)
{
    struct sockaddr_un peer = {0};
    socklen_t length = sizeof(peer) - 1;
    char path[sizeof(peer.sun_path) + sizeof(suffix)];

    if (fd == control || control >= 0)
        return fd == control;
    if (getpeername(fd, (struct sockaddr *)&peer, &length) < 0 || peer.sun_family != AF_UNIX)
        return false;
    size_t end = strlen(peer.sun_path);
    if (end < strlen(name) || strcmp(peer.sun_path + end - strlen(name), name) != 0)
        return false;
    snprintf(path, sizeof(path), "%s%s", peer.sun_path, suffix);
    waits = open(path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
    control = fd;
    return true;
}

static void note_command(const struct msghdr *message)
{
    if (!answered || message->msg_iovlen == 0 || message->msg_iov->iov_len < sizeof(command))
        return; /* more of the same one */
    memcpy(&command, message->msg_iov->iov_base, sizeof(command));
    command = ntohl(command);
    answered = false;
    began_ns = now_ns();
}

static void note_answer(void)
{
    char line[80];

    answered = true;
    int n = snprintf(line, sizeof(line), "%u %lld %lld\n", command, began_ns, now_ns());
    (void)!write(waits, line, (size_t)n);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
    static ssize_t (*real)(int, const struct msghdr *, int);

    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "sendmsg");
    if (is_control(fd))
        note_command(message);
    return real(fd, message, flags);
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags)
{
    static ssize_t (*real)(int, struct msghdr *, int);

    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "recvmsg");
    ssize_t n = real(fd, message, flags);
    if (n > 0 && is_control(fd))
        note_answer();
    return n;
}
