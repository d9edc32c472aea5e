/* How the permanent state's file and its journal are made: with which identity, key and secret. */
#pragma once

#include "checkpoint.h"
#include "cipher.h"
#include "image.h"
#include "io.h"
#include "journal.h"
#include "room.h"

struct state_files {
    struct io *io;
    bool keeps_journals;
    struct journal_settings settings; /* if it does */
    struct cipher_key key;            /* of no bytes: the file is in the clear */
};

/* Write the file, durable but for its name, as that of the vTPM with this identity; `is_continued`
 * says that a journal goes on from it. Returns 0 or a negative errno, and then there is none. */
int state_file_prepare(struct state_files *files, const struct image *image,
                       const uint8_t identity[CHECKPOINT_IDENTITY_BYTES], bool is_continued);

/* Write it into room that was made for it (room.h). Returns what room_fill() does. */
int state_file_fill(struct state_files *files, struct room *room, const struct image *image,
                    const uint8_t identity[CHECKPOINT_IDENTITY_BYTES]);

/* Give it its name. Returns 0 once that is durable, or a negative errno: it may have it or not. */
int state_file_publish(struct state_files *files);

/* Or remove it, if it is there. */
void state_file_discard(struct state_files *files);

/* Return 0 if it is there, or a negative errno. */
int state_file_find(struct state_files *files);

/* Prepare it, as that of this vTPM, and publish it. */
int state_file_write(struct state_files *files, const struct image *image, bool is_continued);

/* Make a journal that goes on from a numbered image, durable but for its name. Returns 0 or a
 * negative errno, and then there is none. */
int state_journal_create(struct state_files *files, const struct image *image,
                         struct journal **journal);
