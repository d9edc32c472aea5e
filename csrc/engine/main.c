/* vtpmd-engine: one vTPM, in a process of its own.
 *
 * Started by vtpmd with the descriptors of enum link_descriptor and nothing else: it opens no path
 * and no network. Three threads: this one serves vtpmd (link.c), another the guest (data.c), and
 * the last one folds the journal (fold.c).
 *
 * Exit status: 0 vtpmd closed the link, 1 the link broke or set-up failed, 2 not started by vtpmd.
 */
#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "data.h"
#include "error.h"
#include "io.h"
#include "link.h"
#include "pages.h"
#include "sandbox.h"
#include "tpm.h"
#include "wipe.h"

static int is_started_by_vtpmd(void)
{
    struct stat link, directory;

    return fstat(LINK_FD_SOCKET, &link) == 0 && S_ISSOCK(link.st_mode) &&
           fstat(LINK_FD_DIRECTORY, &directory) == 0 && S_ISDIR(directory.st_mode);
}

static int seal(void)
{
    int r = sandbox_seal();

    if (r < 0)
        error_report("cannot give up system calls: %s; the kernel needs CONFIG_SECCOMP_FILTER",
                     strerror(-r));
    return r;
}

static int serve_link(struct tpm *tpm, struct store *store, struct data_channel *channel)
{
    struct link link = {LINK_FD_SOCKET, tpm, store, channel};
    enum link_locked locked = sandbox_lock_memory();

    int r = link_boot(&link, LINK_FD_BOOT);
    if (r < 0) {
        error_report("cannot start from the boot record: %s; install vtpmd again", strerror(-r));
        return r;
    }
    r = seal(); /* all threads run */
    if (r < 0)
        return r;
    r = link_serve(&link, locked);
    if (r < 0)
        error_report("the link to vtpmd broke: %s; restart vtpmd", strerror(-r));
    return r;
}

static int serve(void)
{
    struct io_posix io = {.io = io_posix_functions, .directory_fd = LINK_FD_DIRECTORY};
    struct data_channel *channel;
    struct store *store;

    int r = store_map(&store, LINK_FD_STORE, true);
    if (r < 0) {
        error_report("cannot map the store: %s; install vtpmd again", strerror(-r));
        return r;
    }
    struct tpm *tpm = tpm_new(&io.io);
    r = data_channel_new(&channel, tpm);
    if (r >= 0) {
        r = serve_link(tpm, store, channel);
        tpm_let_go(tpm); /* the other thread may wait for it */
        data_channel_free(channel);
    }
    tpm_free(tpm);
    store_free(store);
    return r;
}

/* sandbox: exit_group */
int main(void)
{
    if (!is_started_by_vtpmd()) {
        error_report("this is a part of vtpmd; run `vtpmd run DIR` instead");
        return 2;
    }
    wipe_init();
    /* libcrypto reads its configuration now, and not when a guest waits for what uses it first. */
    OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL);
    int r = sandbox_enter();
    if (r < 0) {
        error_report("cannot give up privileges: %s; is the kernel older than 5.9?", strerror(-r));
        return 1;
    }
    return serve() < 0 ? 1 : 0;
}
