# A guest of 512 bytes: prints a line `ready` on COM1, and then each byte that its keyboard sends (a scan code of set 1, or a
# part of one) as a line of two digits in hexadecimal. What it hears on COM1 it prints as it is; from a `+` to a `-` it counts
# aloud, as fast as it can, a line of eight digits each. See make-tick.
.code16
.globl _start
_start: ljmp $0,$1f
1:  cli; xor %ax,%ax; mov %ax,%ds; mov %ax,%ss; mov $0x7c00,%sp
    mov $0x3f9,%dx; xor %al,%al; out %al,%dx; mov $0x3fb,%dx; mov $0x80,%al; out %al,%dx
    mov $0x3f8,%dx; mov $1,%al; out %al,%dx; inc %dx; xor %al,%al; out %al,%dx
    mov $0x3fb,%dx; mov $3,%al; out %al,%dx
    mov $ready,%si
2:  lodsb; test %al,%al; jz loop; call putc; jmp 2b
loop: in $0x64,%al; test $1,%al; jz com             # nothing from the keyboard yet
    in $0x60,%al; call byte; call line
com: mov $0x3fd,%dx; in %dx,%al; test $1,%al; jz count    # nothing on COM1 yet
    mov $0x3f8,%dx; in %dx,%al; cmp $'+',%al; je 4f; cmp $'-',%al; je 4f; call putc; jmp count
4:  mov %al,mode
count: cmpb $'+',mode; jne loop
    incl counter; mov $4,%cx; mov $counter+3,%di
5:  mov (%di),%al; call byte; dec %di; loop 5b
    call line; jmp loop
byte: mov %al,%bl; shr $4,%al; call digit; mov %bl,%al; and $15,%al
digit: add $'0',%al; cmp $'9',%al; jbe putc; add $39,%al; jmp putc
line: mov $'\n',%al
putc: push %ax; mov $0x3fd,%dx
3:  in %dx,%al; test $0x20,%al; jz 3b; pop %ax; mov $0x3f8,%dx; out %al,%dx; ret
ready: .asciz "ready\n"
mode: .byte '-'
.align 4
counter: .long 0
.org 510
.word 0xaa55
