// Calls the kernels for another process. Reads calls from standard input and answers on standard output, so that a
// program for another kind of processor can serve Python under an emulator (emulated.py).
//   call:      int32 function (its place in the `switch` below), int32 number of arguments, the arguments
//   argument:  a byte for the kind and 8 bytes: 'i' integer; 'f' float64; 'n' null pointer; 'p' memory of so many bytes,
//              which follow; 'o' the same, and its content is sent back after the call; 'a' the memory of an earlier
//              argument
//   answer:    the content of each 'o' in order
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
void ro_quantize(const void*, int, const void*, void*, int64_t, int64_t, int, float, const float*, int, uint64_t, int);
void ro_noise(int, const void*, void*, int64_t, int64_t, const int64_t*, const int64_t*, float, uint64_t, int);
void ro_draw(int, float*, int64_t, int64_t, const int64_t*, const int64_t*, uint64_t, int);
void ro_norm(float*, const float*, const float*, float, float*, int64_t, int64_t, int);
void ro_gate(float*, const float*, int64_t, int);
void ro_attend(float* const*, const int64_t* const*, const int64_t*, float, const void*, int);
void ro_accumulate(const float*, const float*, float*, int64_t, int64_t, int64_t, int, int64_t, int64_t, int, int);
void ro_fingerprints(const uint8_t*, int64_t, int64_t, int64_t, uint64_t*);
void ro_fingerprint(const uint8_t* const*, const int64_t*, int64_t, int64_t, int64_t, uint64_t*);
}

struct Argument {
    char kind;
    int64_t number;
    void* memory;
    bool is_owned() const { return kind == 'p' || kind == 'o'; }
    float real() const {
        double value;
        std::memcpy(&value, &number, sizeof value);
        return (float)value;
    }
    template <class T> operator T*() const { return (T*)memory; }
    operator int64_t() const { return number; }
};

static void read(void* to, size_t bytes) {
    if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the other process has closed the pipe
}

static void call(int function, std::vector<Argument>& a) {
    switch (function) {
        case 0:
            return ro_quantize(a[0], (int)a[1].number, a[2], a[3], a[4], a[5], (int)a[6].number, a[7].real(), a[8],
                               (int)a[9].number, (uint64_t)a[10].number, (int)a[11].number);
        case 1:
            return ro_noise((int)a[0].number, a[1], a[2], a[3], a[4], a[5], a[6], a[7].real(), (uint64_t)a[8].number,
                            (int)a[9].number);
        case 2:
            return ro_draw((int)a[0].number, a[1], a[2], a[3], a[4], a[5], (uint64_t)a[6].number, (int)a[7].number);
        case 3: return ro_norm(a[0], a[1], a[2], a[3].real(), a[4], a[5], a[6], (int)a[7].number);
        case 4: return ro_gate(a[0], a[1], a[2], (int)a[3].number);
        case 5: {  // ten pointers, three pointers to rows, the sizes, the scale, the format, the threads
            float* pointers[10];
            const int64_t* rows[3];
            for (int i = 0; i < 10; ++i) pointers[i] = a[i];
            for (int i = 0; i < 3; ++i) rows[i] = a[10 + i];
            return ro_attend(pointers, rows, a[13], a[14].real(), a[15], (int)a[16].number);
        }
        case 6: return ro_fingerprints(a[0], a[1], a[2], a[3], a[4]);
        case 7: {  // lines, step and the results, then pairs of memory and its size
            std::vector<const uint8_t*> starts;
            std::vector<int64_t> sizes;
            for (size_t i = 3; i + 1 < a.size(); i += 2) {
                starts.push_back(a[i]);
                sizes.push_back(a[i + 1]);
            }
            return ro_fingerprint(starts.data(), sizes.data(), (int64_t)starts.size(), a[0], a[1], a[2]);
        }
        case 8:
            return ro_accumulate(a[0], a[1], a[2], a[3], a[4], a[5], (int)a[6].number, a[7], a[8], (int)a[9].number,
                                 (int)a[10].number);
    }
    std::exit(1);
}

int main() {
    for (;;) {
        int32_t head[2];
        read(head, sizeof head);
        std::vector<Argument> arguments;
        for (int i = 0; i < head[1]; ++i) {
            Argument a{0, 0, nullptr};
            read(&a.kind, 1);
            read(&a.number, sizeof a.number);
            if (a.is_owned()) {
                if (posix_memalign(&a.memory, 64, (size_t)a.number + 64)) std::exit(1);
                read(a.memory, (size_t)a.number);
            } else if (a.kind == 'a') {
                a.memory = arguments[(size_t)a.number].memory;
            }
            arguments.push_back(a);
        }
        call(head[0], arguments);
        for (const Argument& a : arguments)
            if (a.kind == 'o') std::fwrite(a.memory, 1, (size_t)a.number, stdout);
        std::fflush(stdout);
        for (const Argument& a : arguments)
            if (a.is_owned()) std::free(a.memory);
    }
}
