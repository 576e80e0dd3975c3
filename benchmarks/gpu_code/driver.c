/* Stands in for the CUDA driver while kernels are compiled: one device of capability 9.0 that can run nothing. */

enum { OK = 0, UNKNOWN = 999, MAJOR = 75, MINOR = 76 };

int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return OK;
}
int cuDeviceGetCount(int *count) {
  *count = 1;
  return OK;
}
int cuDeviceGet(int *device, int number) {
  *device = 0;
  return OK;
}
int cuCtxGetDevice(int *device) {
  *device = 0;
  return OK;
}
int cuCtxGetDevice_v2(int *device, void *context) { return cuCtxGetDevice(device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == MAJOR ? 9 : 0;
  return OK;
}
int cuModuleLoadData(void **module, const void *image) { return UNKNOWN; }
int cuGetErrorName(int error, const char **name) {
  *name = "CUDA_ERROR_UNKNOWN";
  return OK;
}
int cuGetErrorString(int error, const char **text) {
  *text = "the stand-in for the driver loads nothing";
  return OK;
}
