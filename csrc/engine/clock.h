/* The clock that only goes forward, conditions that are waited for by it, and the time of day. */
#pragma once

#include <pthread.h>
#include <stdint.h>

enum {
    NS_PER_US = 1000,
    NS_PER_MS = 1000000,
    NS_PER_S = 1000000000,
    MS_PER_S = 1000,
};

int64_t clock_ns(void);
int64_t clock_ms(void);

/* The time of day, in milliseconds since 1970 (UTC): for people to read, as it may be set to
 * anything. */
int64_t clock_wall_ms(void);

void clock_condition_init(pthread_cond_t *condition);

/* As pthread_cond_timedwait(). Returns 0 or ETIMEDOUT. */
int clock_wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t ms);
