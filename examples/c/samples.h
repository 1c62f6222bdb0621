// Reads samples: two int64, the count and the tokens of each, and then all ids, masks and labels.

#ifndef SAMPLES_H
#define SAMPLES_H

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST = 1000000 };  // tokens in a file

typedef struct {
  int64_t count, tokens;
  int64_t *ids, *mask, *labels;  // (count, tokens), (count, tokens), (count); one block, at ids
} Samples;

// The ids are NULL if the file is missing, or is not of the size that it says.
static Samples read_samples(const char *path) {
  Samples read = {0};
  FILE *file = fopen(path, "rb");
  if (!file) return read;
  if (fread(&read, sizeof(int64_t), 2, file) == 2 && read.count > 0 && read.tokens > 0 &&
      read.count <= MOST && read.tokens <= MOST / read.count) {
    size_t one = (size_t)(read.count * read.tokens), all = 2 * one + (size_t)read.count;
    int64_t *ids = calloc(all, sizeof(int64_t));
    if (ids && fread(ids, sizeof(int64_t), all, file) == all && fgetc(file) == EOF)
      read.ids = ids, read.mask = ids + one, read.labels = ids + 2 * one;
    else
      free(ids);
  }
  fclose(file);
  return read;
}

#endif
