#include "coming.h"

#include <string.h>

static const struct {
    bool is_written, begins_epoch;
} rows[COMING_STATES] = {
    [COMING_NOTHING] = {false, false}, [COMING_AGAIN] = {false, false},
    [COMING_LATER] = {true, false},    [COMING_BACK] = {false, true},
    [COMING_INSTEAD] = {true, true},
};

static bool is_same(const struct checkpoint_lineage *lineage, const struct checkpoint_lineage *ours)
{
    return memcmp(ours->identity, lineage->identity, sizeof(ours->identity)) == 0;
}

bool coming_is_later(const struct checkpoint_lineage *lineage,
                     const struct checkpoint_lineage *ours)
{
    return is_same(lineage, ours) && lineage->generation > ours->generation;
}

enum coming_state coming_kind(const struct checkpoint_lineage *lineage,
                              const struct checkpoint_lineage *ours, bool is_known)
{
    if (coming_is_later(lineage, ours))
        return COMING_LATER;
    if (is_same(lineage, ours))
        return is_known ? COMING_BACK : COMING_AGAIN;
    return is_known ? COMING_INSTEAD : COMING_LATER;
}

bool coming_is_written(enum coming_state state)
{
    return rows[state].is_written;
}

bool coming_begins_epoch(enum coming_state state)
{
    return rows[state].begins_epoch;
}

uint64_t coming_generation(enum coming_state state, const struct checkpoint_lineage *lineage)
{
    return coming_begins_epoch(state) ? 0 : lineage->generation;
}

/* The one writer of its state. */
static void set(struct coming *coming, enum coming_state state)
{
    *coming = (struct coming){.state = state};
}

void coming_expect(struct coming *coming, const struct checkpoint_lineage *lineage,
                   const struct checkpoint_lineage *ours, bool is_known)
{
    set(coming, coming_kind(lineage, ours, is_known));
    coming->generation = coming_generation(coming->state, lineage);
    memcpy(coming->before, ours->identity, sizeof(coming->before));
}

void coming_end(struct coming *coming)
{
    set(coming, COMING_NOTHING);
}
