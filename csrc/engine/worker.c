#include "worker.h"

#include "check.h"
#include "clock.h"
#include "thread.h"

enum {
    THREAD_STACK_BYTES = 256 << 10,
};

int worker_start(struct worker *worker, void *(*run)(void *), void *argument)
{
    return worker_start_named(worker, NULL, run, argument);
}

int worker_start_named(struct worker *worker, const char *name, void *(*run)(void *),
                       void *argument)
{
    const struct thread_manner manner = {.name = name};

    if (worker->has_thread)
        return 0;
    clock_condition_init(&worker->changed);
    int r = thread_start_as(&worker->thread, THREAD_STACK_BYTES, &manner, run, argument);
    if (r < 0)
        pthread_cond_destroy(&worker->changed);
    worker->has_thread = r >= 0;
    return r;
}

/* sandbox: futex */
void worker_notify(struct worker *worker)
{
    if (worker->has_thread)
        pthread_cond_broadcast(&worker->changed);
}

/* sandbox: futex */
void worker_wait(struct worker *worker, pthread_mutex_t *lock)
{
    pthread_cond_wait(&worker->changed, lock);
}

void worker_wait_until(struct worker *worker, pthread_mutex_t *lock, int64_t ms)
{
    clock_wait_until(&worker->changed, lock, ms);
}

void worker_deinit(struct worker *worker, pthread_mutex_t *lock)
{
    if (!worker->has_thread)
        return;
    pthread_mutex_lock(lock);
    worker->is_ending = true;
    worker_notify(worker);
    pthread_mutex_unlock(lock);
    pthread_join(worker->thread, NULL);
    pthread_cond_destroy(&worker->changed);
    worker->has_thread = false;
}
