/* Look at files as an old 32-bit program does: without large-file support, so inode numbers must fit 32 bits.

   look32 list FOLDER           prints the inode number and name of each entry
   look32 stat < NAMES          prints the inode number, size and first byte of each file named (one a line)

   Ends with 1 at the first error and says which call failed. */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int failed(const char *call, const char *name)
{
    fprintf(stderr, "%s %s: %s\n", call, name, strerror(errno));
    return 1;
}

static int list(const char *folder)
{
    struct dirent *entry;
    DIR *listing = opendir(folder);
    if (!listing)
        return failed("opendir", folder);
    while ((errno = 0, entry = readdir(listing)))
        printf("%lu %s\n", (unsigned long) entry->d_ino, entry->d_name);
    return errno ? failed("readdir", folder) : 0;
}

static int look(const char *name)
{
    struct stat info;
    char first = '-';
    int fd;
    if (stat(name, &info) || lstat(name, &info))
        return failed("stat", name);
    fd = open(name, O_RDONLY);
    if (fd < 0)
        return failed("open", name);
    if (S_ISREG(info.st_mode) && read(fd, &first, 1) < 0)
        return failed("read", name);
    if (fstat(fd, &info))
        return failed("fstat", name);
    close(fd);
    printf("%lu %ld %c\n", (unsigned long) info.st_ino, (long) info.st_size, first);
    return 0;
}

int main(int count, char **words)
{
    char name[4096];
    if (sizeof(void *) != 4 || sizeof(((struct stat *) 0)->st_ino) != 4)
        return 2;
    if (count == 3 && !strcmp(words[1], "list"))
        return list(words[2]);
    while (fgets(name, sizeof name, stdin)) {
        name[strcspn(name, "\n")] = 0;
        if (look(name))
            return 1;
    }
    return 0;
}
