// Writes a .safetensors file of float32 tensors, which onnx-adapt and others read.

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

typedef struct {
  const char *name;
  const float *data;
  size_t count, rank;
  int64_t dims[8];
} Tensor;

// The file is the length of the header as uint64, the header as JSON, and all numbers. A name that
// JSON would have to escape is refused. Gives 0 if all was written.
static int write_safetensors(const char *path, const Tensor *tensors, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (strpbrk(tensors[i].name, "\"\\")) return -1;
  FILE *file = fopen(path, "wb");
  if (!file) return -1;
  uint64_t length = 0, end = 0;
  fwrite(&length, sizeof length, 1, file);  // it is known when the header is written
  fputc('{', file);
  for (size_t i = 0; i < count; i++) {
    fprintf(file, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[", i ? "," : "", tensors[i].name);
    for (size_t axis = 0; axis < tensors[i].rank; axis++)
      fprintf(file, "%s%" PRId64, axis ? "," : "", tensors[i].dims[axis]);
    uint64_t begin = end;
    end += tensors[i].count * sizeof(float);
    fprintf(file, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", begin, end);
  }
  fputc('}', file);
  length = (uint64_t)ftell(file) - sizeof length;
  for (size_t i = 0; i < count; i++)
    fwrite(tensors[i].data, sizeof(float), tensors[i].count, file);
  rewind(file);
  fwrite(&length, sizeof length, 1, file);
  int broken = ferror(file);
  return fclose(file) || broken;
}

#endif
