/* The permanent state: its image in memory, and where on the disk it is safe.
 *
 *     off ──durable_begin──► on ──a change──► with a journal ──durable_end──► off
 *                                                  │      ▲
 *                                                  └─fold─┘
 *
 * Off, or without settings for a journal, a change that finds none replaces the whole file
 * (checkpoint.h). On, it is appended to a journal (journal.h), which is opened at the first change
 * that finds the image in its file, and folded into a new file when it is worn. It stays when the
 * TPM is off for a moment (durable_pause()), as in a guest's reset. Where there is no room for a
 * journal, files are replaced. What is acknowledged is on the disk:
 *
 *     open     journal of the image that the file holds · the file again, which says from now on
 *              that a journal continues it
 *     append   record
 *     fold     file, with the image as it is when folding begins; still continued · a new journal
 *              of that base, with one record for what came after · the new one's name
 *     close    file, no longer continued · removal of the journal
 *
 * At every moment the file's image is one that the journal knows, and one that says that a journal
 * continues it has one. A power loss between any two steps leaves what journal_recover.h recovers.
 *
 * Folding writes beside the commits, in a thread of its own; only to put the new journal in place
 * does it keep them waiting. After a write or sync that failed, a journal takes no more: the commit
 * fails, libtpms stops the TPM, and the next commit or durable_end() closes it first. An anchor
 * that may have seen a change that failed is told of the image before, before a file is all that
 * has it. Whatever has failed may be on the disk: the next commit, also of the image before, or
 * durable_end() has that there instead. A snapshot that could not be loaded is an older one.
 *
 * Where the image is, and what the disk has of the last commit, is a table (standing.h); so is what
 * is made of what comes (coming.h).
 *
 * The same thread makes the file of what is expected to be committed, ahead of that (ahead.h): the
 * commit does no more than publish it then.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "anchor.h"
#include "checkpoint.h"
#include "cipher.h"
#include "io.h"
#include "journal.h"

struct durable;
struct store;

/* Without journals. Returns 0 or a negative errno. */
int durable_new(struct durable **durable, struct io *io);

/* Overwrite and free the image and the keys; nothing is written. */
void durable_free(struct durable *durable);

/* Keep journals from now on, folded in a thread of its own or by hand. The numbers of generations
 * come from `store`, which has to outlive this. Returns 0, -EBUSY while on or with a journal, or
 * another negative errno if there is no thread. */
int durable_set_journal(struct durable *durable, const struct journal_settings *settings,
                        struct store *store, bool in_thread);

/* Keep none all the same, where there is room for state files alone: each change replaces the file,
 * which says whose it is. After durable_set_journal(), while off. */
void durable_forgo_journals(struct durable *durable);

/* The generation of the image that durable_load() gives, as its file has it; 0: not known. Whether
 * that says whose it is, too. */
void durable_set_loaded(struct durable *durable, uint64_t generation, bool is_known);

/* Encrypt the file with a key, which is copied. Returns 0, or -EBUSY while on or with a journal. */
int durable_set_key(struct durable *durable, const struct cipher_key *key);

/* Write an anchor (anchor.h), whose descriptor is durable's then, after each change. Returns 0, or
 * -EINVAL before durable_set_journal() or while on. */
int durable_set_anchor(struct durable *durable, const struct anchor *anchor);

bool durable_has_anchor(const struct durable *durable);

/* Take an image that is durable: in its file, or elsewhere. Returns 0, -EBUSY with a journal that
 * could not be closed, or -ENOMEM. */
int durable_load(struct durable *durable, const uint8_t *bytes, size_t n_bytes, bool is_in_file);

/* Take a state that has come in place of the image, and of its journal: none of that is of use any
 * more. What has the SHA-256 `elsewhere` is durable there, and a start takes that up; unless it is
 * this very state, until durable_store(), it is to be written into the file now. What is written
 * from now on says that it is the vTPM of this identity. Returns 0 or a negative errno; then the
 * image is the one before. */
int durable_adopt(struct durable *durable, const uint8_t *bytes, size_t n_bytes,
                  const uint8_t elsewhere[DIGEST_BYTES], bool is_to_be_written,
                  const uint8_t identity[CHECKPOINT_IDENTITY_BYTES]);

/* True if that has failed when it had begun: the directory may have nothing but what is elsewhere.
 */
bool durable_is_adopting(const struct durable *durable);

/* What is committed next has come from elsewhere, and is this lineage's: it is written even if it
 * is what the image holds, where that would lose what the lineage says. If it takes the place of
 * another image that is known, and is no later one of the same vTPM, it begins the next restore
 * epoch (epoch.h). Else it keeps its generation, if it is what durable_bring() was given, byte for
 * byte: should its guest run on where it has come from, what comes the next time is no earlier
 * state. Only while off. Returns 0 or a negative errno: a journal could not be closed. */
int durable_expect(struct durable *durable, const struct checkpoint_lineage *lineage);

/* Return true if it has been committed; else it is not expected any more, and the image is whose it
 * was. */
bool durable_has_come(struct durable *durable);

/* Return where the image stands in its vTPM's history, as far as that is known. */
struct checkpoint_lineage durable_lineage(const struct durable *durable);

/* Return true if there is an image, and it is known whose: what others than this have written, and
 * what was not changed since, is anybody's. */
bool durable_is_known(const struct durable *durable);

/* Returns false if there is no image. */
bool durable_get(const struct durable *durable, const uint8_t **bytes, size_t *n_bytes);

/* Make an image durable and keep it. Returns 0 or a negative errno; then the image is the one
 * before, and the disk may have either. */
int durable_commit(struct durable *durable, const uint8_t *bytes, size_t n_bytes);

/* QEMU has brought these bytes as the permanent state of a TPM that is off. */
void durable_bring(struct durable *durable, const uint8_t *bytes, size_t n_bytes);

/* What is committed next may be these bytes, and of this lineage, or else of the vTPM's own: have
 * their file made ahead, beside what goes on. Nothing happens without durable_set_journal(), while
 * on and with a journal. If it fails, or something else is committed, all is as without this. */
void durable_prepare(struct durable *durable, const uint8_t *bytes, size_t n_bytes,
                     const struct checkpoint_lineage *lineage);

/* While off: such may come, if the TPM is not on in a moment. Have room for it (room.h), so that
 * its commit has less to wait for. */
void durable_await(struct durable *durable);

/* None comes any more: have the room removed, too. Does not wait for the disk. */
void durable_unawait(struct durable *durable);

/* It will not be committed: have the file removed. Does not wait for the disk. */
void durable_unprepare(struct durable *durable);

/* For who folds by hand: make or remove that file, or the room, or empty that, if it is to be.
 * Commits and the end do so, too. */
void durable_work_ahead(struct durable *durable);

/* While that `is_so`, a commit to a journal does not wait for the disk: it is durable with the next
 * one, or when the journal is folded or left, and a loss of power before may undo it. Where there
 * is an anchor it waits: that must not be ahead of the journal. */
void durable_defer(struct durable *durable, bool is_so);

/* Put the image into its file, if it is durable elsewhere. `lock`, by which one caller at a time is
 * here, is given up while it writes: whoever changes the image, or the files, waits. Returns 0 or a
 * negative errno. */
int durable_store(struct durable *durable, pthread_mutex_t *lock);

/* The name, without version.h's prefix, of the file that was written last, or could not be. */
const char *durable_target(const struct durable *durable);

/* Another process may have written to the directory since this has: have the image in its file
 * again, if there is one, and no journal that continues another. Without an image what is committed
 * next sees to that. Returns 0 or a negative errno. */
int durable_reclaim(struct durable *durable);

/* The TPM is on: journals may be opened. */
void durable_begin(struct durable *durable);

/* It is off: none is. One that is there goes on. */
void durable_pause(struct durable *durable);

/* Its files must not change: wait for a folding, and leave the journal as it is, synced as far as
 * that can be done. */
void durable_leave(struct durable *durable);

/* Return true if a journal continues the file. */
bool durable_has_journal(const struct durable *durable);

/* Return true if it is not in its file yet, but in the room that was made for it. */
bool durable_is_in_room(const struct durable *durable);

/* Return true if the image was put into its file, and somebody else has removed that. */
bool durable_is_removed(struct durable *durable);

/* Wait for a folding, and close the journal. Returns 0, also if there is none, or a negative errno:
 * the journal, if there was one, is still there then, and goes on. */
int durable_end(struct durable *durable);

/* The three parts of folding, for who folds by hand: commits may come between them. The first and
 * the last do not wait for the disk longer than a commit. Each returns 0; -EINVAL if it is not its
 * turn, as there is no journal, or a full one was folded by a commit; or a negative errno, and then
 * folding is over. */
int durable_begin_fold(struct durable *durable);
int durable_write_fold(struct durable *durable);
int durable_switch_fold(struct durable *durable);
