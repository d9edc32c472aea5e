/* The state of one vTPM as libtpms hands it out and asks for it: three images, and their files.
 *
 * libtpms calls back into these on its own (nvram.c registers itself), always with the TPM's lock
 * held. An image is replaced only after its file is durable, so that what libtpms reads back is
 * never newer than the disk.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io.h"
#include "link_types.h"

/* The store of this process. libtpms is process-global, and so is this. */
void nvram_register(struct io *io);

/* Take what a state file holds as the image that libtpms reads next, without writing it.
 * Returns 0 or -ENOMEM. */
int nvram_load(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Encrypt every state file that is written from now on: `key_bytes` is 16 or 32. */
void nvram_set_key(const uint8_t *key, size_t key_bytes);

/* Write the anchor behind `fd`, which is nvram's then, after each commit of the permanent state and
 * before its response. */
void nvram_set_anchor(int fd, const struct link_anchor *says);

/* True if there is an image of that type. */
bool nvram_has(enum link_state_type type);

/* Take an image that is durable elsewhere as the one that libtpms reads next. Returns 0 or a
 * negative errno. */
int nvram_adopt(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Make an image durable and keep it. Returns 0 or a negative errno; then nothing has changed. */
int nvram_store(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Write an image into its file, though the file may hold it already. Returns 0, also if there is
 * none, or a negative errno. */
int nvram_store_again(enum link_state_type type);

/* Remove an image and its file, durably. Returns 0, also if there was none, or a negative errno. */
int nvram_remove(enum link_state_type type);

/* Overwrite and free every image, overwrite the key, and close the anchor. */
void nvram_deinit(void);
