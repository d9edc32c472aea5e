/* Writes the first sector of the owner record for vtpmd, which has made it (docs/owner-record.md):
 * by a thread of its own, as the guest stands still, and nothing waits for a disk but the Grant.
 *
 *     idle ──recorder_begin()──► writing ──`done` is called──► idle
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "link_types.h"

struct io;
struct recorder;

/* Called by that thread, with the sector durable, or with the negative errno of what failed. */
typedef void recorder_done(void *argument, int r, uint32_t took_us);

/* Starts the thread. Returns 0 or a negative errno. */
int recorder_new(struct recorder **recorder, struct io *io, recorder_done *done, void *argument);

/* Waits for the disk, if something is written. NULL is none. */
void recorder_free(struct recorder *recorder);

/* Write the sector to the start of a file, whose descriptor is the recorder's then. Returns 0; or
 * -EBUSY, with nothing done, while another one is written. */
int recorder_begin(struct recorder *recorder, int fd, const uint8_t sector[LINK_SECTOR_BYTES]);

/* Wait until nothing is written, and `done` has returned. */
void recorder_wait(struct recorder *recorder);
