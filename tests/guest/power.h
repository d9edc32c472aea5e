/*
 * The guest's power: what its kernel does to the TPM when it sleeps and wakes up. What is measured
 * here is in a PCR that outlives that, unlike those of the workload. Functions return 0, or -1 with
 * a failure; facts go to standard output.
 */
#pragma once

/* Have the kernel suspend to RAM; returns when somebody has woken it up. */
int power_sleep(void);

/* Extend the PCR that outlives sleep. */
int power_measure(const char *text);

/* Say what that PCR holds, and how often the TPM was reset and restarted. */
int power_read(void);
