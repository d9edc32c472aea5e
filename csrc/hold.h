/* Holding a mutex to the end of a block, however it is left. */
#pragma once

#include <pthread.h>

#include "bytes.h"

static inline void let_go_of_mutex(pthread_mutex_t **mutex)
{
    pthread_mutex_unlock(*mutex);
}

#define hold_mutex(mutex)                                                                          \
    cleanup(let_go_of_mutex) pthread_mutex_t *held __attribute__((unused)) = (mutex);              \
    pthread_mutex_lock(held)
