#include "recorder.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "hold.h"
#include "io.h"
#include "worker.h"

struct recorder {
    struct io *io;
    recorder_done *done;
    void *argument;
    struct worker worker;
    pthread_mutex_t lock; /* over what follows */
    bool is_writing;
    int fd;
    uint8_t sector[LINK_SECTOR_BYTES];
    int64_t began_ns;
};

void recorder_free(struct recorder *recorder)
{
    if (!recorder)
        return;
    worker_deinit(&recorder->worker, &recorder->lock);
    pthread_mutex_destroy(&recorder->lock);
    free(recorder);
}

/* Nothing else touches it while `is_writing`. */
static void write_sector(struct recorder *recorder)
{
    struct io *io = recorder->io;

    int r = io->write_at(io, recorder->fd, recorder->sector, sizeof(recorder->sector), 0);
    if (r >= 0)
        r = io->sync_data(io, recorder->fd);
    io->close(io, recorder->fd);
    recorder->done(recorder->argument, r < 0 ? r : 0,
                   (uint32_t)((clock_ns() - recorder->began_ns) / NS_PER_US));
}

static void *run(void *argument)
{
    struct recorder *recorder = argument;

    pthread_mutex_lock(&recorder->lock);
    while (recorder->is_writing || !recorder->worker.is_ending) {
        if (!recorder->is_writing) {
            worker_wait(&recorder->worker, &recorder->lock);
            continue;
        }
        pthread_mutex_unlock(&recorder->lock);
        write_sector(recorder);
        pthread_mutex_lock(&recorder->lock);
        recorder->is_writing = false;
        worker_notify(&recorder->worker);
    }
    pthread_mutex_unlock(&recorder->lock);
    return NULL;
}

int recorder_new(struct recorder **out, struct io *io, recorder_done *done, void *argument)
{
    struct recorder *recorder = calloc(1, sizeof(*recorder));

    if (!recorder)
        return -ENOMEM;
    recorder->io = io;
    recorder->done = done;
    recorder->argument = argument;
    check(pthread_mutex_init(&recorder->lock, NULL) == 0);
    int r = worker_start_named(&recorder->worker, "recorder", run, recorder);
    if (r < 0) {
        recorder_free(recorder);
        return r;
    }
    *out = recorder;
    return 0;
}

int recorder_begin(struct recorder *recorder, int fd, const uint8_t sector[LINK_SECTOR_BYTES])
{
    hold_mutex(&recorder->lock);
    if (recorder->is_writing)
        return -EBUSY;
    recorder->fd = fd;
    memcpy(recorder->sector, sector, sizeof(recorder->sector));
    recorder->began_ns = clock_ns();
    recorder->is_writing = true;
    worker_notify(&recorder->worker);
    return 0;
}

void recorder_wait(struct recorder *recorder)
{
    hold_mutex(&recorder->lock);
    while (recorder->is_writing)
        worker_wait(&recorder->worker, &recorder->lock);
}
