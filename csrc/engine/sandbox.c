#include "sandbox.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define SANDBOX_ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__) && defined(__LITTLE_ENDIAN__)
#define SANDBOX_ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "sandbox.c does not know what Linux calls this architecture"
#endif

#include "sandbox_filter.h"

int sandbox_enter(void)
{
    struct rlimit no_core = {0, 0};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -errno;
    if (setrlimit(RLIMIT_CORE, &no_core) < 0)
        return -errno;
    /* Also keeps processes of the same user from attaching and from /proc/PID/mem. */
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
        return -errno;
    signal(SIGPIPE, SIG_IGN); /* nobody may read standard error any more */
    signal(SIGXFSZ, SIG_IGN); /* a file that would be too large is a write that fails */
    return 0;
}

/* With a limit too low for what is mapped later, locking the future makes allocations fail. */
static int future_fits(void)
{
    enum { FUTURE_BYTES_MAX = 16 << 20 }; /* many times what libtpms allocates */

    void *probe =
        mmap(NULL, FUTURE_BYTES_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (probe == MAP_FAILED)
        return 0;
    munmap(probe, FUTURE_BYTES_MAX);
    return 1;
}

enum locked sandbox_lock_memory(void)
{
    /* Pages are locked when they are first used: memory that is never touched costs nothing. */
    if (mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT) == 0 && future_fits())
        return LOCKED_ALL;
    munlockall();
    return mlockall(MCL_CURRENT | MCL_ONFAULT) == 0 ? LOCKED_PRESENT : LOCKED_NOTHING;
}

/* What the sanitizers' own code calls, in builds that have it. ThreadSanitizer has a thread, which
 * may start after this, and sleeps.
 * sandbox(sanitizers): mprotect sigaltstack sched_yield rseq set_robust_list nanosleep */
int sandbox_seal(void)
{
    struct sock_filter filter[] = {SANDBOX_FILTER};
    struct sock_fprog program = {.len = sizeof(filter) / sizeof(*filter), .filter = filter};

    long r = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program);
    if (r < 0)
        return -errno;
    return r > 0 ? -ESRCH : 0; /* the number of a thread that has a filter of its own */
}
