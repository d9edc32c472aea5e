#include "thread.h"

#include <semaphore.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "check.h"

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
