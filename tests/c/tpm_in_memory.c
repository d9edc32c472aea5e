#include "tpm_in_memory.h"

#include <libtpms/tpm_error.h>

#include "check.h"
#include "journal.h"
#include "pages.h"

struct io_memory io;
struct store *store;
struct tpm *tpm;

static struct store *own_store;

static const struct journal_settings settings = {
    .identity = "this vTPM's own.",
    .file_bytes = 16 * JOURNAL_PAGE_BYTES, /* as each test makes it anew */
};

void tpm_in_memory_begin(void)
{
    io_memory_init(&io);
    tpm = tpm_new(&io.io);
    check(store_new(&own_store) == 0);
    check(store_map(&store, store_fd(own_store), true) == 0);
    check(tpm_set_journal(tpm, &settings, store, 0, true) == TPM_SUCCESS);
}

void tpm_in_memory_end(void)
{
    tpm_free(tpm);
    store_free(store);
    store_free(own_store);
    io_memory_deinit(&io);
}
