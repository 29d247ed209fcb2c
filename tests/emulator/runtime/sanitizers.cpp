// Reports go to a file during a launch (see sanitizers.py). When one of them ends the process, this shows it.
#include "sanitizers.h"

#include <sys/stat.h>
#include <unistd.h>

#include <emulator/runtime.h>

namespace {

constexpr off_t kEnough = 64 * 1024;  // bytes of reports, of which sanitizers.py shows the first

int g_reports = -1, g_stderr = -1;

off_t reported_bytes() {
  struct stat status;
  return g_reports >= 0 && fstat(g_reports, &status) == 0 ? status.st_size : 0;
}

void show_reports() {
  char text[4096];
  lseek(g_reports, 0, SEEK_SET);
  for (ssize_t bytes; (bytes = read(g_reports, text, sizeof(text))) > 0;) {
    if (write(g_stderr, text, bytes) < 0) return;
  }
}

}  // namespace

bool emulator::enough_reports() { return reported_bytes() > kEnough; }

void emulator::forget_reported_races() {
  if (__tsan_flush_memory && reported_bytes() > 0) __tsan_flush_memory();
}

extern "C" EMULATOR_API void emulator_show_reports_at_death(int file, int stderr_file) {
  if (g_reports < 0 && __sanitizer_set_death_callback) __sanitizer_set_death_callback(show_reports);
  g_reports = file;
  g_stderr = stderr_file;
}
