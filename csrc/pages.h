/* The store: the images of one vTPM's state, in memory that vtpmd and its engine share.
 *
 * libtpms has no dirty interface: it gives out a whole image. The store keeps the last one of each
 * type with a generation for every page of PAGE_BYTES; a capture compares, and copies and stamps
 * the pages that differ. What changed since a generation is then known without a comparison.
 *
 * The memory is a memfd whose size is sealed, laid out as
 *
 *     Offset          Size   Content
 *     0               4096   magic, version, limits; a control block for each image
 *     4096            32768  permanent: u64 generation of each page
 *     36864           262144 permanent: bytes
 *     299008, 593920  294912 the same for volatile and savestate
 *
 * in the machine's own order: both ends are one build on one machine. Memory of pages that no image
 * reached is never touched.
 *
 * One process writes, one thread of it at a time; the others map it read-only. A sequence lock
 * keeps a reader from seeing half a capture. Readers do not trust the writer (invariant 8): each
 * number is copied once, held against its limit, then used, and bytes that were read are a copy.
 *
 * Generations begin at 1, a change makes the next one, and none is used twice (invariant 10). 0 is
 * the empty image that is there before the first capture. An image of length 0 is one that the TPM
 * does not have.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    IMAGE_TYPE_MIN = 1, /* types are those of enum link_state_type */
    IMAGE_TYPE_MAX = 3,
    IMAGE_BYTES_MAX =
        256 << 10,   /* libtpms' largest, a full NV memory with all objects, is 175 KiB */
    PAGE_BYTES = 64, /* a cache line; PCR_Extend touches four */
    IMAGE_PAGES_MAX = IMAGE_BYTES_MAX / PAGE_BYTES,
    STORE_RANGES_MAX = IMAGE_PAGES_MAX / 2, /* every other page */
};

/* So that it is a number for signed 64-bit integers too. */
#define GENERATION_MAX ((uint64_t)INT64_MAX)
/* That another host may give, or QEMU: beyond it a vTPM would soon have no numbers left. */
#define GENERATION_GIVEN_MAX (UINT64_C(1) << 62)

struct store;

/* What a reader may find. */
enum store_result {
    STORE_BUSY = 1,    /* the image was being written for as long as the reader tried: try again */
    STORE_DAMAGED = 2, /* the writer broke a limit: end it */
};

/* Make an empty store and map it read-only. Returns 0 or a negative errno. */
int store_new(struct store **store);

/* Map the store behind `fd`, which stays the caller's. One process maps it writable. Returns 0;
 * -EBADMSG if there is none of this version, or its size is not sealed; or a negative errno. */
int store_map(struct store **store, int fd, bool writable);

/* Make an empty store in memory of this process alone, where none can be shared: a limit on the
 * size of files counts for a memfd, too. It is written here, and has no descriptor. Returns 0 or a
 * negative errno. */
int store_new_alone(struct store **store);

/* Unmap and free; NULL is nothing. The memory goes with the last process that has it. */
void store_free(struct store *store);

/* The memfd, to hand to another process. It belongs to the store. -1 unless it was made here. */
int store_fd(const struct store *store);

/* Take `bytes` as the image, up to IMAGE_BYTES_MAX of them. `*generation` is then that of the
 * image: a new one if a byte or the length differs from the last image. Returns 0; -EMSGSIZE for an
 * image that is too large or -EOVERFLOW past GENERATION_MAX, with nothing changed. */
int store_capture(struct store *store, unsigned type, const uint8_t *bytes, size_t n_bytes,
                  uint64_t *generation);

/* Make every generation that is still to come larger than `floor`, at most GENERATION_MAX: what
 * another process or host has used already. */
void store_raise_generation(struct store *store, unsigned type, uint64_t floor);

/* Take a number for an image that is not captured. Returns 0, or -EOVERFLOW past GENERATION_MAX. */
int store_take_generation(struct store *store, unsigned type, uint64_t *generation);

/* Return what that will give next once the numbers are raised to `floor`, if nothing is taken in
 * between; GENERATION_MAX + 1: it will fail. */
uint64_t store_next_generation(const struct store *store, unsigned type, uint64_t floor);

/* Read an image: into `out`, of IMAGE_BYTES_MAX bytes, unless that is NULL. Returns 0 or an enum
 * store_result, and then nothing of `out` may be used. */
int store_read(struct store *store, unsigned type, uint8_t *out, size_t *n_bytes,
               uint64_t *generation);

/* Whole pages of an image, but for the last, which ends with the image. */
struct store_range {
    uint32_t offset;
    uint32_t n_bytes;
};

/* The pages of one generation that are younger than another. */
struct store_changes {
    uint64_t generation;
    uint32_t image_bytes; /* the image may have become shorter with no page changed */
    uint32_t n_bytes;     /* in all ranges */
    uint32_t n_ranges;
    struct store_range ranges[STORE_RANGES_MAX]; /* apart and in order */
};

/* Find the pages that changed after generation `since`. Returns 0 or an enum store_result. */
int store_collect(struct store *store, unsigned type, uint64_t since,
                  struct store_changes *changes);
