#include "slice.h"

#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    SHORTEST_NS = 100000,
    USUAL_NS = 0, /* the kernel's own */
};

/* struct sched_attr of linux/sched/types.h, which C libraries from 2025 on declare, too. */
struct scheduling {
    uint32_t n_bytes;
    uint32_t policy;
    uint64_t flags;
    int32_t niceness;
    uint32_t priority;
    uint64_t slice_ns;
    uint64_t deadline_ns;
    uint64_t period_ns;
};

static void be(uint64_t slice_ns)
{
    struct scheduling scheduling = {0};

    if (syscall(SYS_sched_getattr, 0, &scheduling, sizeof(scheduling), 0) < 0 ||
        scheduling.policy != SCHED_OTHER)
        return;
    scheduling.n_bytes = sizeof(scheduling);
    scheduling.slice_ns = slice_ns;
    syscall(SYS_sched_setattr, 0, &scheduling, 0);
}

void slice_be_short(void)
{
    be(SHORTEST_NS);
}

void slice_be_usual(void)
{
    be(USUAL_NS);
}
