// Trains an adapter: runs the step that `onnx-adapt train-graph` wrote, by ONNX Runtime's C API.
//
//     train STEP.onnx STEP.start.onnx SAMPLES STEPS RATE ADAPTER.safetensors
//
// The inputs of the step are those of the base (here `input_ids` and `attention_mask`), `labels`,
// `rate`, and what is carried: the weights, the memory of the optimiser and the count of steps.
// For each carried NAME there is an output `next:NAME`, which the following step takes as NAME.
// Plain C11 for Linux and macOS on machines that are little-endian, as the files are.

#include <math.h>
#include <onnxruntime_c_api.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "safetensors.h"
#include "samples.h"

enum { BATCH = 8 };  // samples in a step

typedef struct {
  OrtSession *session;
  size_t inputs, outputs;
  char **input, **output;  // their names
} Model;

static const OrtApi *ort;
static OrtAllocator *allocator;
static OrtMemoryInfo *memory;

static void fail(const char *format, ...) {
  va_list given;
  va_start(given, format);
  vfprintf(stderr, format, given);
  va_end(given);
  fputc('\n', stderr);
  exit(2);
}

static void check(OrtStatus *status) {
  if (!status) return;
  fprintf(stderr, "ONNX Runtime: %s\n", ort->GetErrorMessage(status));
  ort->ReleaseStatus(status);
  exit(2);
}

static void *allocate(size_t count, size_t size) {
  void *block = calloc(count + 1, size);
  if (!block) fail("there is no memory for %zu numbers", count);
  return block;
}

static Model open_model(OrtEnv *env, const char *path) {
  Model model;
  OrtSessionOptions *options;
  check(ort->CreateSessionOptions(&options));
  check(ort->SetIntraOpNumThreads(options, 1));  // for a small model
  check(ort->CreateSession(env, path, options, &model.session));
  ort->ReleaseSessionOptions(options);
  check(ort->SessionGetInputCount(model.session, &model.inputs));
  check(ort->SessionGetOutputCount(model.session, &model.outputs));
  model.input = allocate(model.inputs, sizeof(char *));
  model.output = allocate(model.outputs, sizeof(char *));
  for (size_t i = 0; i < model.inputs; i++)
    check(ort->SessionGetInputName(model.session, i, allocator, &model.input[i]));
  for (size_t i = 0; i < model.outputs; i++)
    check(ort->SessionGetOutputName(model.session, i, allocator, &model.output[i]));
  return model;
}

static void close_model(Model model) {
  for (size_t i = 0; i < model.inputs; i++) check(ort->AllocatorFree(allocator, model.input[i]));
  for (size_t i = 0; i < model.outputs; i++) check(ort->AllocatorFree(allocator, model.output[i]));
  free(model.input);
  free(model.output);
  ort->ReleaseSession(model.session);
}

static void release(OrtValue **values, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (values[i]) ort->ReleaseValue(values[i]);
  free(values);
}

// Runs a model; the array of its outputs is the caller's to release.
static OrtValue **run(Model model, OrtValue **fed) {
  OrtValue **made = allocate(model.outputs, sizeof(OrtValue *));
  check(ort->Run(model.session, NULL, (const char **)model.input, (const OrtValue **)fed,
                 model.inputs, (const char **)model.output, model.outputs, made));
  return made;
}

// Where the output PREFIX NAME is; the number of outputs if there is none.
static size_t find_output(Model model, const char *prefix, const char *name) {
  size_t length = strlen(prefix), i = 0;
  while (i < model.outputs && (strncmp(model.output[i], prefix, length) ||
                               strcmp(model.output[i] + length, name)))
    i++;
  return i;
}

// Takes the output PREFIX NAME out of the outputs that a model made.
static OrtValue *take(Model model, OrtValue **made, const char *prefix, const char *name) {
  size_t place = find_output(model, prefix, name);
  if (place == model.outputs) fail("the model has no output %s%s", prefix, name);
  OrtValue *value = made[place];
  made[place] = NULL;
  return value;
}

// The numbers stay the OrtValue's own.
static Tensor read_tensor(const char *name, OrtValue *value) {
  Tensor tensor = {.name = name};
  OrtTensorTypeAndShapeInfo *info;
  ONNXTensorElementDataType type;
  void *data;
  check(ort->GetTensorTypeAndShape(value, &info));
  check(ort->GetTensorElementType(info, &type));
  check(ort->GetTensorShapeElementCount(info, &tensor.count));
  check(ort->GetDimensionsCount(info, &tensor.rank));
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || tensor.rank > 8)
    fail("%s is not float32, or has more than 8 axes", name);
  check(ort->GetDimensions(info, tensor.dims, tensor.rank));
  check(ort->GetTensorMutableData(value, &data));
  tensor.data = data;
  ort->ReleaseTensorTypeAndShapeInfo(info);
  return tensor;
}

// Makes the tensor to feed as NAME, from the sample at `first` on, over the samples' own memory.
static OrtValue *feed(const char *name, const Samples *samples, int64_t first, float *rate) {
  int64_t rows = samples->count - first < BATCH ? samples->count - first : BATCH;
  int64_t dims[] = {rows, samples->tokens}, all = rows * samples->tokens;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  void *data = NULL;
  size_t rank = 2, bytes = sizeof(int64_t) * (size_t)all;
  if (!strcmp(name, "input_ids")) data = samples->ids + first * samples->tokens;
  if (!strcmp(name, "attention_mask")) data = samples->mask + first * samples->tokens;
  if (!strcmp(name, "labels"))
    data = samples->labels + first, rank = 1, bytes = sizeof(int64_t) * (size_t)rows;
  if (!strcmp(name, "rate"))
    data = rate, rank = 0, bytes = sizeof(float), type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (!data) fail("the step has an input %s, for which there are no samples", name);
  OrtValue *value;
  check(ort->CreateTensorWithDataAsOrtValue(memory, data, bytes, dims, rank, type, &value));
  return value;
}

// The first value of each input of the step that is carried; NULL in the place of the others.
static OrtValue **begin(OrtEnv *env, const char *path, Model step) {
  Model start = open_model(env, path);
  if (start.inputs) fail("%s has inputs: it is not what train-graph wrote beside the step", path);
  OrtValue **made = run(start, NULL), **carried = allocate(step.inputs, sizeof(OrtValue *));
  for (size_t i = 0; i < step.inputs; i++)
    if (find_output(step, "next:", step.input[i]) < step.outputs)
      carried[i] = take(start, made, "", step.input[i]);
  release(made, start.outputs);
  close_model(start);
  return carried;
}

// Takes one step, which replaces what is carried; gives the loss before it.
static float learn(Model step, OrtValue **carried, const Samples *samples, int64_t first,
                   float rate) {
  OrtValue **fed = allocate(step.inputs, sizeof(OrtValue *));
  for (size_t i = 0; i < step.inputs; i++)
    fed[i] = carried[i] ? carried[i] : feed(step.input[i], samples, first, &rate);
  OrtValue **made = run(step, fed);
  for (size_t i = 0; i < step.inputs; i++)
    if (carried[i]) carried[i] = take(step, made, "next:", step.input[i]);
  release(fed, step.inputs);
  OrtValue *value = take(step, made, "", "loss");
  float loss = *read_tensor("loss", value).data;
  ort->ReleaseValue(value);
  release(made, step.outputs);
  return loss;
}

// Whether a carried input is a weight, not the count of steps or the memory of an optimiser.
static int is_weight(const char *name) {
  return strcmp(name, "step") && strncmp(name, "mean:", 5) && strncmp(name, "square:", 7) &&
         strncmp(name, "velocity:", 9);
}

// Writes the weights as an adapter; their names are those that the adapted model has for them.
static void write_adapter(const char *path, Model step, OrtValue **carried) {
  Tensor *weights = allocate(step.inputs, sizeof(Tensor));
  size_t count = 0;
  for (size_t i = 0; i < step.inputs; i++)
    if (carried[i] && is_weight(step.input[i]))
      weights[count++] = read_tensor(step.input[i], carried[i]);
  for (size_t i = 0; i < count; i++)
    for (size_t k = 0; k < weights[i].count; k++)
      if (!isfinite(weights[i].data[k])) fail("%s is not finite: no adapter", weights[i].name);
  if (write_safetensors(path, weights, count)) fail("cannot write %s", path);
  free(weights);
}

int main(int count, char **given) {
  if (count != 7) fail("usage: %s STEP.onnx START.onnx SAMPLES STEPS RATE OUT.safetensors", *given);
  char *behind_steps, *behind_rate;
  long steps = strtol(given[4], &behind_steps, 10);
  float rate = strtof(given[5], &behind_rate);
  if (*behind_steps || *behind_rate || steps < 1 || !(rate > 0) || isinf(rate))
    fail("STEPS and RATE are numbers above 0");
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!ort) fail("ONNX Runtime %s is older than its header", OrtGetApiBase()->GetVersionString());
  OrtEnv *env;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "train", &env));
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  Samples samples = read_samples(given[3]);
  if (!samples.ids) fail("%s is no whole file of samples", given[3]);
  Model step = open_model(env, given[1]);
  OrtValue **carried = begin(env, given[2], step);
  int64_t first = 0;
  for (long i = 1; i <= steps; i++) {
    float loss = learn(step, carried, &samples, first, rate);
    if (!isfinite(loss)) fail("the loss of step %ld is not finite: no adapter", i);
    printf("step %ld loss %.9g\n", i, loss);
    first = first + BATCH < samples.count ? first + BATCH : 0;
  }
  write_adapter(given[6], step, carried);
  release(carried, step.inputs);
  close_model(step);
  free(samples.ids);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseEnv(env);
  return 0;
}
