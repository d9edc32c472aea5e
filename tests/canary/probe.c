/* What the sealed sandbox answers to any system call: the kernel is asked.
 *
 * In place of the engine's main(). Reads lines of a call's number and its six arguments. Each call
 * is made by a child that has sealed itself; prints the child's wait status, a line each. The exit
 * status is the call's errno, 0 if it has succeeded. ABORT, in a number's place, calls abort().
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/sandbox.h"

enum {
    ABORT = -1,
    NOT_SEALED = 254,
};

int __wrap_main(void);

static _Noreturn void make_call(long number, const long a[6])
{
    if (sandbox_seal() < 0)
        _exit(NOT_SEALED);
    if (number == ABORT)
        abort();
    long r = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    _exit(r < 0 ? errno : 0);
}

int __wrap_main(void)
{
    long number, a[6];
    int status;

    if (sandbox_enter() < 0)
        return 1;
    while (scanf("%ld%ld%ld%ld%ld%ld%ld", &number, a, a + 1, a + 2, a + 3, a + 4, a + 5) == 7) {
        pid_t child = fork();
        if (child == 0)
            make_call(number, a);
        if (child < 0 || waitpid(child, &status, 0) < 0)
            return 1;
        printf("%d\n", status);
    }
    return 0;
}
