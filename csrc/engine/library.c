#include "library.h"

#include <dlfcn.h>
#include <libtpms/tpm_error.h>

TPM_RESULT library_set_profile(const char *profile)
{
    TPM_RESULT (*set_profile)(const char *);

    *(void **)&set_profile = dlsym(RTLD_DEFAULT, "TPMLIB_SetProfile");
    return set_profile ? set_profile(profile) : TPM_BAD_PARAMETER;
}
