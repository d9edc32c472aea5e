#include "epoch.h"

#include "pages.h"

#define EPOCHS_OF_SNAPSHOTS (GENERATION_GIVEN_MAX / EPOCH_GENERATIONS - EPOCHS_OF_IMPORTS)

uint64_t epoch_of(uint64_t generation)
{
    return generation / EPOCH_GENERATIONS;
}

uint64_t epoch_begin(uint64_t generation)
{
    uint64_t next = epoch_of(generation) + 1;

    return next < EPOCHS_OF_SNAPSHOTS ? next * EPOCH_GENERATIONS : generation + 1;
}
