#include "nvram.h"

#include <errno.h>
#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_nvfilename.h>
#include <stdlib.h>
#include <string.h>

#include "anchor.h"
#include "bytes.h"
#include "check.h"
#include "checkpoint.h"
#include "digest.h"
#include "error.h"
#include "tpm.h"

struct image {
    const char *name;
    uint8_t *bytes; /* NULL: there is none */
    size_t n_bytes;
};

static struct io *store_io;
static struct cipher_key checkpoint_key; /* of no bytes: state files are in the clear */
static struct anchor anchor = {.fd = -1};
static bool anchor_failed;
static struct image images[] = {
    [LINK_STATE_PERMANENT] = {.name = TPM_PERMANENT_ALL_NAME},
    [LINK_STATE_VOLATILE] = {.name = TPM_VOLATILESTATE_NAME},
    [LINK_STATE_SAVESTATE] = {.name = TPM_SAVESTATE_NAME},
};

/* Of a TPM that is not this host's yet: its permanent state, whose file must not be written. */
static struct image held = {.name = TPM_PERMANENT_ALL_NAME};
static bool held_has_changed;

static const struct cipher_key *current_key(void)
{
    return checkpoint_key.n_bytes ? &checkpoint_key : NULL;
}

static struct image *image_by_name(const char *name)
{
    for (size_t i = LINK_STATE_PERMANENT; i <= LINK_STATE_SAVESTATE; i++)
        if (strcmp(images[i].name, name) == 0)
            return &images[i];
    return NULL;
}

static void image_clear(struct image *image)
{
    if (image->bytes)
        explicit_bzero(image->bytes, image->n_bytes);
    free(image->bytes);
    image->bytes = NULL;
    image->n_bytes = 0;
}

static int image_reserve(uint8_t **out, size_t n_bytes)
{
    *out = malloc(n_bytes ? n_bytes : 1);
    return *out ? 0 : -ENOMEM;
}

static void image_replace(struct image *image, uint8_t *bytes, const uint8_t *from, size_t n_bytes)
{
    memcpy(bytes, from, n_bytes);
    image_clear(image);
    image->bytes = bytes;
    image->n_bytes = n_bytes;
}

static bool is_permanent(const struct image *image)
{
    return image == &images[LINK_STATE_PERMANENT];
}

/* A change that the anchor has not seen could be rolled back unseen: it is none. */
static int show_anchor(const uint8_t *state, size_t state_bytes)
{
    uint8_t digest[DIGEST_BYTES];

    if (anchor.fd < 0)
        return 0;
    int r = digest_compute(state, state_bytes, digest);
    if (r >= 0)
        r = anchor_write(store_io, &anchor, anchor.generation + 1, digest);
    anchor_failed = r < 0;
    return r;
}

/* Announced before: a file in place of another does not say which came later. */
static int write_permanent(const uint8_t *state, size_t state_bytes)
{
    uint8_t digest[DIGEST_BYTES];

    if (anchor.fd >= 0) {
        int r = digest_compute(state, state_bytes, digest);
        if (r >= 0)
            r = anchor_expect(store_io, &anchor, digest);
        anchor_failed = r < 0;
        if (r < 0)
            return r;
    }
    int r = checkpoint_write(store_io, current_key(), TPM_PERMANENT_ALL_NAME, state, state_bytes);
    return r < 0 ? r : show_anchor(state, state_bytes);
}

static int image_store(struct image *image, const uint8_t *state, size_t state_bytes)
{
    uint8_t *bytes;

    /* libtpms commits at each INIT, and often nothing has changed: the image is durable. */
    if (image->bytes && image->n_bytes == state_bytes &&
        memcmp(image->bytes, state, state_bytes) == 0)
        return 0;
    /* Memory first: once the file is durable, nothing may fail. */
    int r = image_reserve(&bytes, state_bytes);
    if (r < 0)
        return r;
    if (is_permanent(image))
        r = write_permanent(state, state_bytes);
    else
        r = checkpoint_write(store_io, current_key(), image->name, state, state_bytes);
    if (r < 0) {
        free(bytes);
        return r;
    }
    image_replace(image, bytes, state, state_bytes);
    return 0;
}

static int image_remove(struct image *image)
{
    int r = checkpoint_remove(store_io, image->name);
    if (r < 0)
        return r;
    image_clear(image);
    return 0;
}

static int image_write(const struct image *image)
{
    return checkpoint_write(store_io, current_key(), image->name, image->bytes, image->n_bytes);
}

static int image_set(struct image *image, const uint8_t *state, size_t state_bytes)
{
    uint8_t *bytes;

    int r = image_reserve(&bytes, state_bytes);
    if (r < 0)
        return r;
    image_replace(image, bytes, state, state_bytes);
    return 0;
}

int nvram_load(enum link_state_type type, const uint8_t *state, size_t state_bytes)
{
    return image_set(&images[type], state, state_bytes);
}

void nvram_set_key(const uint8_t *key, size_t key_bytes)
{
    check(key_bytes <= sizeof(checkpoint_key.bytes));
    memcpy(checkpoint_key.bytes, key, key_bytes);
    checkpoint_key.n_bytes = (uint32_t)key_bytes;
}

void nvram_set_anchor(int fd, const struct link_anchor *says)
{
    anchor = (struct anchor){.fd = fd, .serial = says->serial, .generation = says->generation};
    memcpy(anchor.identity, says->identity, sizeof(anchor.identity));
    memcpy(anchor.digest, says->digest, sizeof(anchor.digest));
}

bool nvram_has(enum link_state_type type)
{
    return images[type].bytes != NULL;
}

int nvram_store(enum link_state_type type, const uint8_t *state, size_t state_bytes)
{
    return image_store(&images[type], state, state_bytes);
}

int nvram_store_again(enum link_state_type type)
{
    const struct image *image = &images[type];

    return image->bytes ? image_write(image) : 0;
}

int nvram_remove(enum link_state_type type)
{
    return image_remove(&images[type]);
}

int nvram_hold(const uint8_t *state, size_t state_bytes)
{
    held_has_changed = false;
    return image_set(&held, state, state_bytes);
}

int nvram_admit(void)
{
    struct image *image = &images[LINK_STATE_PERMANENT];

    int r = held_has_changed ? write_permanent(held.bytes, held.n_bytes)
                             : show_anchor(held.bytes, held.n_bytes);
    if (r < 0)
        return r;
    image_clear(image);
    *image = held;
    held.bytes = NULL;
    return 0;
}

void nvram_let_go(void)
{
    image_clear(&held);
}

void nvram_deinit(void)
{
    nvram_let_go();
    for (size_t i = LINK_STATE_PERMANENT; i <= LINK_STATE_SAVESTATE; i++)
        image_clear(&images[i]);
    explicit_bzero(&checkpoint_key, sizeof(checkpoint_key));
    close_descriptor(&anchor.fd);
}

/* libtpms' callbacks. It has one TPM, number 0. */

static TPM_RESULT on_init(void)
{
    return TPM_SUCCESS;
}

static TPM_RESULT on_load(unsigned char **data, uint32_t *length, uint32_t tpm_number,
                          const char *name)
{
    struct image *image = image_by_name(name);
    uint8_t *copy;

    (void)tpm_number;
    if (!image || !image->bytes)
        return TPM_RETRY; /* "there is no such file" */
    if (image_reserve(&copy, image->n_bytes) < 0)
        return TPM_SIZE;
    memcpy(copy, image->bytes, image->n_bytes);
    *data = copy;
    *length = (uint32_t)image->n_bytes;
    return TPM_SUCCESS;
}

static int hold_more(const uint8_t *state, size_t state_bytes)
{
    if (held.n_bytes == state_bytes && memcmp(held.bytes, state, state_bytes) == 0)
        return 0;
    held_has_changed = true;
    return image_set(&held, state, state_bytes);
}

static TPM_RESULT on_store(const unsigned char *data, uint32_t length, uint32_t tpm_number,
                           const char *name)
{
    struct image *image = image_by_name(name);

    (void)tpm_number;
    if (!image)
        return TPM_FAIL;
    if (held.bytes && image == &images[LINK_STATE_PERMANENT])
        return hold_more(data, length) < 0 ? TPM_SIZE : TPM_SUCCESS;
    int r = image_store(image, data, length);
    if (r < 0) {
        /* libtpms stops the TPM on this: an unsaved change is never acknowledged. */
        error_report("cannot store %s%s: %s; the TPM answers TPM_RC_FAILURE until the guest "
                     "restarts: make room or repair the file system, then restart the guest",
                     anchor_failed ? "the anchor of tpm2-00." : "tpm2-00.", image->name,
                     strerror(-r));
        anchor_failed = false;
        return TPM_FAIL;
    }
    return TPM_SUCCESS;
}

static TPM_RESULT on_delete(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    struct image *image = image_by_name(name);

    (void)tpm_number;
    if (!image || (must_exist && !image->bytes))
        return TPM_FAIL;
    return image_remove(image) < 0 ? TPM_FAIL : TPM_SUCCESS;
}

static TPM_RESULT on_get_physical_presence(TPM_BOOL *present, uint32_t tpm_number)
{
    (void)tpm_number;
    *present = FALSE;
    return TPM_SUCCESS;
}

void nvram_register(struct io *io)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_init = on_init,
        .tpm_nvram_loaddata = on_load,
        .tpm_nvram_storedata = on_store,
        .tpm_nvram_deletename = on_delete,
        .tpm_io_init = on_init,
        .tpm_io_getlocality = tpm_on_get_locality,
        .tpm_io_getphysicalpresence = on_get_physical_presence,
    };

    store_io = io;
    check(TPMLIB_RegisterCallbacks(&callbacks) == TPM_SUCCESS);
}
