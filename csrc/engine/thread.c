#include "thread.h"

#include <sched.h>
#include <semaphore.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"

enum {
    SLICE_NS = 100000, /* the shortest that there is */
};

struct start {
    const struct thread_manner *manner;
    void *(*run)(void *);
    void *argument;
    sem_t is_running;
};

static void *begin(void *argument)
{
    struct start *start = argument;
    void *(*run)(void *) = start->run;
    void *run_argument = start->argument;

    if (start->manner->name) /* by itself: another thread would have to write to /proc for it */
        prctl(PR_SET_NAME, start->manner->name);
    if (start->manner->niceness) /* of this thread alone, as Linux has it; unless it gives way */
        setpriority(PRIO_PROCESS, 0, start->manner->niceness);
    sem_post(&start->is_running); /* the caller's stack from here on */
    return run(run_argument);
}

int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *argument)
{
    return thread_start_as(thread, stack_bytes, &(struct thread_manner){0}, run, argument);
}

/* A thread's end frees its stack and blocks its signals; both may be left out.
 * sandbox: futex exit madvise=ENOSYS rt_sigprocmask=0 */
int thread_start_as(pthread_t *thread, size_t stack_bytes, const struct thread_manner *manner,
                    void *(*run)(void *), void *argument)
{
    struct start start = {.manner = manner, .run = run, .argument = argument};
    pthread_attr_t attributes;

    check(sem_init(&start.is_running, 0, 0) == 0);
    check(pthread_attr_init(&attributes) == 0);
    check(pthread_attr_setstacksize(&attributes, stack_bytes) == 0);
    int error = pthread_create(thread, &attributes, begin, &start);
    while (!error && sem_wait(&start.is_running) < 0) {
    }
    pthread_attr_destroy(&attributes);
    sem_destroy(&start.is_running);
    return -error;
}

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

void thread_ask_for_short_slices(void)
{
    struct scheduling scheduling = {0};

    if (syscall(SYS_sched_getattr, 0, &scheduling, sizeof(scheduling), 0) < 0 ||
        scheduling.policy != SCHED_OTHER)
        return;
    scheduling.n_bytes = sizeof(scheduling);
    scheduling.slice_ns = SLICE_NS;
    syscall(SYS_sched_setattr, 0, &scheduling, 0);
}
