#include "thread.h"

#include <semaphore.h>
#include <sys/resource.h>

#include "check.h"

struct start {
    int niceness;
    void *(*run)(void *);
    void *argument;
    sem_t is_running;
};

static void *begin(void *argument)
{
    struct start *start = argument;
    void *(*run)(void *) = start->run;
    void *run_argument = start->argument;

    if (start->niceness) /* of this thread alone, as Linux has it; unless it gives way already */
        setpriority(PRIO_PROCESS, 0, start->niceness);
    sem_post(&start->is_running); /* the caller's stack from here on */
    return run(run_argument);
}

int thread_start(pthread_t *thread, size_t stack_bytes, void *(*run)(void *), void *argument)
{
    return thread_start_nice(thread, stack_bytes, 0, run, argument);
}

/* A thread's end frees its stack and blocks its signals; both may be left out.
 * sandbox: futex exit madvise=ENOSYS rt_sigprocmask=0 */
int thread_start_nice(pthread_t *thread, size_t stack_bytes, int niceness, void *(*run)(void *),
                      void *argument)
{
    struct start start = {.niceness = niceness, .run = run, .argument = argument};
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
