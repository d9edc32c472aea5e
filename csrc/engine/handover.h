/* The part of a session from the freeze to the Grant, as a function of a state and an event, in one
 * table and without I/O: the same code runs in the engine (blackout.c), in the model and in the
 * simulator.
 *
 *     source        none ─OFFER─► offered ─ASKED─► frozen ─TAKE─► retiring ─RETIRED─► granted
 *     destination   none ─HOLD─► held ─TAIL─► taking ─INIT─► waiting ─GRANT─► started
 *                                               └─GRANT─► entitled ─INIT─► started
 *
 * What vtpmd has decided before (that the owner record says offered, which tail QEMU gets; what the
 * TPM on standby has been started from, and which tail says so) is what OFFER and HOLD bring. From
 * there on it is only told, and has to ask if it wants something else: a session that was granted
 * is not ended any more. docs/stream-format.md has the table.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "handover.cdef.h"

enum {
    HANDOVER_N_STATES = HANDOVER_STARTED + 1,
    HANDOVER_N_EVENTS = HANDOVER_TIMED_OUT + 1,
};
