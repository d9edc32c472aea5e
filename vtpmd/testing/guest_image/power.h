/*
 * The guest's power: what its kernel does to the TPM when it sleeps and wakes up. What is measured
 * here is in a PCR that outlives that, unlike those of the workload. Functions return 0, or -1 with
 * a failure; facts go to standard output.
 */
#pragma once

/* Say TPM2_Shutdown(STATE), as a kernel that drives the TPM does before it sleeps. */
int power_shutdown(void);

/* Have the kernel suspend to RAM; returns when somebody has woken it up. */
int power_sleep(void);

/* Extend the PCR that outlives sleep. */
int power_measure(const char *text);

/* Use what a TPM that is not shut down in order then counts as a failure (an NV write). */
int power_touch(void);

/* Say what that PCR holds, how often the TPM was reset and restarted, and what failures it counts.
 */
int power_read(void);
