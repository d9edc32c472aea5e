#include "clock.h"

#include <time.h>

#include "check.h"

/* The kernel's code in the process, or its call where the clock cannot be read by that.
 * sandbox: clock_gettime */
static struct timespec now_by(clockid_t clock)
{
    struct timespec now;

    check(clock_gettime(clock, &now) == 0);
    return now;
}

int64_t clock_ns(void)
{
    struct timespec now = now_by(CLOCK_MONOTONIC);

    return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

int64_t clock_ms(void)
{
    return clock_ns() / NS_PER_MS;
}

int64_t clock_wall_ms(void)
{
    struct timespec now = now_by(CLOCK_REALTIME);

    return (int64_t)now.tv_sec * MS_PER_S + now.tv_nsec / NS_PER_MS;
}

void clock_condition_init(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;

    check(pthread_condattr_init(&attributes) == 0);
    check(pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC) == 0);
    check(pthread_cond_init(condition, &attributes) == 0);
    pthread_condattr_destroy(&attributes);
}

/* sandbox: futex */
int clock_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t ms)
{
    struct timespec until = {.tv_sec = ms / MS_PER_S, .tv_nsec = ms % MS_PER_S * NS_PER_MS};

    return pthread_cond_timedwait(condition, lock, &until);
}
