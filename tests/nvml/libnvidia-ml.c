/* Stands for the library of NVIDIA's driver where there is none: one GPU that is 37 % busy.

   Ray's agent of a node loads libnvidia-ml.so.1 and asks for what is here; for the rest it hears that the
   driver is too old. */

#include <string.h>

struct memory { unsigned long long total, free, used; };
struct utilization { unsigned int gpu, memory; };

int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int result) { return "not in this library"; }

int nvmlDeviceGetCount_v2(unsigned int *count) { return *count = 1, 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { return *device = "GPU", 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned int length) { return strcpy(name, "Stand-in"), 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) { return strcpy(uuid, "GPU-0"), 0; }
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
  return *memory = (struct memory){16ull << 30, 13ull << 30, 3ull << 30}, 0;
}
int nvmlDeviceGetUtilizationRates(void *device, struct utilization *rates) {
  return *rates = (struct utilization){37, 10}, 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, void *infos) { return *count = 0, 0; }
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned int *count, void *infos) { return *count = 0, 0; }
