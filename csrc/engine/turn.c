#include "turn.h"

#include <errno.h>

#include "check.h"
#include "clock.h"
#include "hold.h"

void turn_init(struct turn *turn)
{
    check(pthread_cond_init(&turn->changed, NULL) == 0);
    check(pthread_mutex_init(&turn->lock, NULL) == 0);
    clock_condition_init(&turn->told);
}

void turn_deinit(struct turn *turn)
{
    pthread_cond_destroy(&turn->told);
    pthread_mutex_destroy(&turn->lock);
    pthread_cond_destroy(&turn->changed);
}

/* sandbox: futex */
void turn_change(struct turn *turn)
{
    hold_mutex(&turn->lock);
    pthread_cond_broadcast(&turn->told);
    pthread_cond_broadcast(&turn->changed);
}

/* sandbox: futex */
void turn_wait(struct turn *turn, pthread_mutex_t *lock)
{
    pthread_cond_wait(&turn->changed, lock);
}

bool turn_wait_apart(struct turn *turn, bool (*waits)(void *), void *argument, int64_t until_ms)
{
    int r = 0;

    hold_mutex(&turn->lock);
    while (waits(argument) && r != ETIMEDOUT)
        r = clock_wait_until(&turn->told, &turn->lock, until_ms);
    return !waits(argument);
}
