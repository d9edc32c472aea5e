/* The state of one vTPM as libtpms hands it out and asks for it: three images, and their files.
 *
 * libtpms calls back into these on its own (nvram.c registers itself), always with the TPM's lock
 * held, or by a command that runs apart (long_command.h). An image is replaced only after its file
 * is durable, so that what libtpms reads back is never newer than the disk.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "digest.h"
#include "io.h"
#include "link_types.h"

struct anchor;
struct checkpoint_lineage;
struct cipher_key;
struct image;
struct journal_settings;
struct store;

/* The store of this process. libtpms is process-global, and so is this. */
void nvram_register(struct io *io);

/* Take what a state file holds as the image that libtpms reads next, without writing it.
 * Returns 0 or a negative errno. */
int nvram_load(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Keep journals of the permanent state from now on. `store` has to outlive this. `loaded` and
 * `is_known` are as durable_set_loaded() has them. Returns 0 or a negative errno, -EBUSY with a
 * journal. */
int nvram_set_journal(const struct journal_settings *settings, struct store *store, uint64_t loaded,
                      bool is_known);

/* Keep none all the same: each change replaces the file. After nvram_set_journal(). */
void nvram_forgo_journals(void);

/* Encrypt every state file that is written from now on. The key is copied. Returns 0, or -EBUSY
 * with a journal. */
int nvram_set_key(const struct cipher_key *key);

/* Return the key, or NULL: there is none. */
const struct cipher_key *nvram_key(void);

/* Write an anchor, whose descriptor is nvram's then, after each commit of the permanent state.
 * Returns 0, or -EINVAL before nvram_set_journal(). */
int nvram_set_anchor(const struct anchor *anchor);

/* What the permanent state says of its guest's last TPM2_Shutdown, as orderly_shutdown(); of a TPM
 * 1.2, LINK_SHUTDOWN_STATE if there is a saved state. */
enum link_shutdown nvram_last_shutdown(void);

/* Put the permanent state into its file, if it is durable elsewhere. The TPM's lock is given up
 * meanwhile: what stores a permanent state waits, or has it read-only, and nothing else. Returns 0,
 * also if there is none, or a negative errno. */
int nvram_store_permanent(pthread_mutex_t *lock);

/* The vTPM is, or may be, another host's: while that `is_so` no file is written, but by
 * nvram_adopt(). What would write one fails with -EROFS; nvram_end() leaves the journal as it is.
 * Waits for a folding that is under way. */
void nvram_set_read_only(bool is_so);

/* While that `is_so`, what is stored as the permanent state need not survive a loss of power until
 * the next that is stored has: nobody was promised it. Of the journal only. */
void nvram_defer(bool is_so);

/* Whether the TPM is on: journals are opened only then. */
void nvram_set_on(bool is_so);

/* QEMU was given the state, which is on storage that hosts share: let go of the lock, so that
 * another host's vTPM can have it. No journal is left. Returns 0, or a negative errno: then it is
 * kept. */
int nvram_unlock(void);

/* The state is to come, and another host's vTPM has the lock meanwhile. */
void nvram_start_unlocked(void);

/* Another program has served the state, and may write to its files once more, without the lock; as
 * swtpm does when QEMU ends it, after its guest has left. From now on nothing depends on what is in
 * them: each change replaces the file, and so does the end. Nothing unless another may have the
 * lock, as else what is brought has not been served from here. */
void nvram_beware(void);

/* Have the lock again, if this has not, and the files as they are here, whatever another has left.
 * Returns 0 or a negative errno; then it is not locked, or is another host's, too. */
int nvram_lock(void);

/* Return true if there is a journal. */
bool nvram_has_journal(void);

/* Return true if the permanent state is where it has come, and not in its file (room.h). */
bool nvram_is_in_room(void);

/* Close the journal. Returns 0, or a negative errno with the journal left as it is. */
int nvram_end(void);

/* Return true if the permanent state's file is to be there, and is not: somebody else has removed
 * it. Of a vTPM that is another host's nothing is known. */
bool nvram_is_removed(void);

/* Find an image, which is there until it changes. Returns false if there is none. */
bool nvram_get(enum link_state_type type, const uint8_t **bytes, size_t *n_bytes);

/* True if there is an image of that type, or a file that could not be written wholly. */
bool nvram_may_have(enum link_state_type type);

/* Make an image durable and keep it. Returns 0 or a negative errno; then the image is the one
 * before. */
int nvram_store(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Remove an image, not the permanent one, and its file, durably. Returns 0, also if there was none,
 * or a negative errno. */
int nvram_remove(enum link_state_type type);

/* What a TPM is to start from; of the volatile state there may be nothing. The digest of a
 * TPM 1.2's is of one image with the saved state, as a session brings it (saved.h). */
struct nvram_states {
    const uint8_t *permanent;
    size_t permanent_bytes;
    const uint8_t *permanent_digest;
    const uint8_t *volatile_state;
    size_t volatile_bytes;
    const uint8_t *volatile_digest;
    const uint8_t *saved; /* of a TPM 1.2 */
    size_t saved_bytes;   /* 0: none */
};

/* Have libtpms load these, which stay the caller's, and nothing that files hold, until `states` is
 * NULL. */
void nvram_give(const struct nvram_states *states);

/* Keep what is stored as the permanent state in memory, beside the image, until nvram_let_go();
 * `state` is durable elsewhere. Returns 0 or -ENOMEM. */
int nvram_hold(const uint8_t *state, size_t state_bytes);

/* What is stored as the permanent state next is of this lineage. Returns 0 or a negative errno. */
int nvram_expect(const struct checkpoint_lineage *lineage);

/* What is stored as the permanent state next may be this, of this lineage or of the vTPM's own if
 * that is NULL: its file is made ahead, where it may be written. Does not wait for the disk. */
void nvram_prepare(const uint8_t *state, size_t state_bytes,
                   const struct checkpoint_lineage *lineage);

/* While the TPM is off: such may come, if it is not on in a moment. */
void nvram_await(void);

/* None comes any more. Does not wait for the disk. */
void nvram_unawait(void);

/* It will not be. Does not wait for the disk. */
void nvram_unprepare(void);

/* Return true if that was stored; else it is expected no more. */
bool nvram_has_come(void);

/* Return true if to store it has failed since libtpms was started, which has stopped the TPM then:
 * what libtpms has goes with no image, and on nowhere. */
bool nvram_has_failed(void);

/* Get where the permanent state stands in its vTPM's history. Returns false if there is none, or
 * it is not known whose it is. */
bool nvram_get_lineage(struct checkpoint_lineage *lineage);

/* Make what was held the image, of this lineage, and `saved` that of the saved state, if it exists;
 * remove the others, which are of no use any more. With `is_to_be_written` it is in the permanent
 * state's file then, else maybe only where it was. It is still held. Returns 0 or a negative errno.
 */
int nvram_adopt(const struct checkpoint_lineage *lineage, bool is_to_be_written,
                const struct image *saved);

/* True if that has failed when it had begun: the directory may have nothing but what was held. */
bool nvram_is_adopting(void);

/* Overwrite and free what is held, if anything is; the image is as it was before. */
void nvram_let_go(void);

/* Overwrite and free every image, overwrite the key, and close the anchor. */
void nvram_deinit(void);
