/* Restore epochs: what is put back in time goes on with numbers that nothing else of its vTPM has.
 *
 * The generations of a vTPM are divided into epochs. An import begins the next one
 * (vtpmd/store/importing.py), and so does a snapshot that QEMU loads (engine/durable.h).
 */
#pragma once

#include <stdint.h>

#define EPOCH_GENERATIONS (UINT64_C(1) << 50)

/* The last ones are begun by imports alone: who puts a guest back by each test of a suite uses up
 * none that its backups need. */
#define EPOCHS_OF_IMPORTS UINT64_C(256)

/* Return of which epoch a generation is, from 0 on. */
uint64_t epoch_of(uint64_t generation);

/* Return the first generation of the epoch after that of a generation; where no snapshot begins
 * that any more, the generation after it. */
uint64_t epoch_begin(uint64_t generation);
